# SPDX-License-Identifier: Apache-2.0
"""A model of clusters that cannot be rented: training, links and faults as discrete events, and the product's policies.

What is decided is decided by the product's own functions: what a snapshot holds, how large it may be, when its bytes
may go, what arenas have room for, who holds a replica, which losses that survives, which mode is taken. The world
around them is modelled: processors, links, the schedule of a pipeline, all-to-alls, faults and restarts.
"""

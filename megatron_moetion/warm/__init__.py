"""Ranks that come back without their processes being started anew."""

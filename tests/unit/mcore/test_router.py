# SPDX-License-Identifier: Apache-2.0
"""The router that MoEtion gives to Megatron: the same as Megatron's at base capacity, and more room when it is raised.

Recoveries of whole models with it are in ``tests/dist/test_inventory.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
    get_mlp_module_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed as dist

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore import router as router_module
from megatron_moetion.mcore.router import (
    CapacityRouter,
    Counts,
    RouterWatch,
    TokenCounters,
    keep_mask,
    use_capacity_router,
)
from megatron_moetion.recover.capacity import CapacityRules

EXPERTS, TOKENS = 8, 64
GROUPS = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[SimpleNamespace]:
    """The groups of a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    yield SimpleNamespace(tp=world, cp=world, tp_cp=world, tp_dp_cp=world)
    dist.destroy_process_group()


def config(**changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_moe_experts": EXPERTS, "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none", "moe_expert_capacity_factor": 1.0, "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "alltoall",
    }  # fmt: skip
    return TransformerConfig(**{**fields, **changes})


def routers(**changes: Any) -> tuple[TopKRouter, CapacityRouter]:
    return TopKRouter(config(**changes), GROUPS), CapacityRouter(config(**changes), GROUPS)


def logits(seed: int = 0) -> torch.Tensor:
    """Skewed: the first experts get most of the tokens."""
    torch.manual_seed(seed)
    return (torch.randn(TOKENS, 1, EXPERTS) + torch.linspace(2, 0, EXPERTS)).requires_grad_()


def routed(router: TopKRouter, given: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Probabilities, map and the gradient of a loss that uses them."""
    given.grad = None
    probs, where = router.routing(given, padding_mask=mask)
    (probs * torch.arange(1.0, 1 + EXPERTS)).sum().backward()
    assert given.grad is not None
    return [probs.detach(), where, given.grad.clone()]


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 7.5])
def test_at_base_capacity_it_is_megatrons_router_bit_for_bit(
    topk: int, policy: str, pads: bool, factor: float | None
) -> None:
    settings = {
        "moe_router_topk": topk, "moe_token_drop_policy": policy, "moe_expert_capacity_factor": factor,
        "moe_pad_expert_input_to_capacity": pads and factor is not None, "moe_router_pre_softmax": True,
    }  # fmt: skip
    theirs, ours = routers(**settings)
    for seed in range(3):
        for a, b in zip(routed(theirs, logits(seed)), routed(ours, logits(seed)), strict=True):
            assert torch.equal(a, b)


_AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
LOSSES = {
    "z": {"moe_z_loss_coeff": 0.1},
    "aux": _AUX,
    "seq": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "two": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]},
    "token": _AUX | {"calculate_per_token_loss": True},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_score_function": "sigmoid"},
    "mtp": _AUX | {"mtp_num_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_so_are_losses_and_gradients(
    kind: str, masked: bool, one_rank: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    settings = {"moe_router_pre_softmax": True, **LOSSES[kind]}
    theirs, ours = (cls(config(**settings), one_rank) for cls in (TopKRouter, CapacityRouter))
    for router in (theirs, ours):
        router.set_layer_number(1)
    mask = (torch.arange(TOKENS)[:, None] % 5 == 0) if masked else None
    for seed in range(2):
        expected, found = (routed(router, logits(seed), mask) for router in (theirs, ours))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.skipif(not hasattr(TopKRouter, "quantile_balancing"), reason="new in megatron-core 0.19")
def test_so_is_quantile_balancing_which_has_no_capacity(
    one_rank: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    settings = {"moe_router_load_balancing_type": "quantile_balancing", "moe_expert_capacity_factor": None}
    theirs, ours = (cls(config(**settings), one_rank) for cls in (TopKRouter, CapacityRouter))
    for seed in range(3):
        expected, found = (routed(router, logits(seed)) for router in (theirs, ours))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert torch.equal(theirs.qb_beta_accum, ours.qb_beta_accum)
        assert int(ours.qb_beta_count) == seed + 1
        for router in (theirs, ours):
            router.qb_beta.copy_(router.qb_beta_accum / router.qb_beta_count)
    assert ours.qb_beta.any()


def test_padding_is_not_counted_into_the_expert_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many tokens as experts, where all versions of Megatron can take a mask."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    mask = torch.arange(EXPERTS).reshape(EXPERTS, 1) % 2 == 0
    counts = []
    for router in routers(**settings):
        router.routing(logits()[:EXPERTS], padding_mask=mask)
        counts.append(router.local_tokens_per_expert)
    assert torch.equal(*counts)
    assert 0 < int(counts[0].sum()) < 2 * EXPERTS


def test_the_expert_bias_counts_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    theirs, ours = routers(**settings)
    for router in (theirs, ours):
        router.routing(logits())
    assert torch.equal(theirs.local_tokens_per_expert, ours.local_tokens_per_expert)
    assert 0 < int(ours.local_tokens_per_expert.sum()) < 2 * TOKENS


def counts_of(router: CapacityRouter) -> Counts:
    router.counts = Counts(torch.zeros(Counts.ROWS, EXPERTS, dtype=torch.float64))
    return router.counts


@pytest.mark.parametrize("pads", [False, True])
def test_it_counts_routed_and_processed_tokens_while_training_only(pads: bool) -> None:
    _, router = routers(moe_pad_expert_input_to_capacity=pads)
    counts = counts_of(router)
    _, where = router.routing(logits())
    with torch.no_grad():
        router.routing(logits())
    base = TOKENS * 2 // EXPERTS
    assert counts.routed.sum() == 2 * TOKENS
    assert torch.equal(counts.processed, counts.routed.clamp(max=base))
    assert counts.beyond.sum() == 0
    assert torch.equal(where.sum(dim=0).double(), torch.full_like(counts.routed, base) if pads else counts.processed)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_raised_capacity_admits_so_many_more_of_the_right_ones(policy: str) -> None:
    _, router = routers(moe_token_drop_policy=policy)
    counts = counts_of(router)
    boost = torch.ones(EXPERTS, dtype=torch.float64)
    boost[0], boost[1] = 1.3, 1.5
    given = logits()
    router.routing(given)
    counts.beyond.zero_()
    router.boost = boost
    probs, kept = router.routing(given)
    router.factor = None
    free_probs, free_map = router.routing(given)
    base = TOKENS * 2 // EXPERTS
    room = torch.tensor([21, 24, *[base] * (EXPERTS - 2)])
    assert torch.equal(kept.sum(dim=0), torch.minimum(free_map.sum(dim=0), room))
    assert torch.equal(counts.beyond, (kept.sum(dim=0) - base).clamp(min=0).double())
    for expert in range(EXPERTS):
        mine = free_map[:, expert].nonzero()[:, 0].tolist()
        if policy == "probs":
            mine = sorted(mine, key=lambda t: (-free_probs[t, expert].item(), t))
        assert kept[:, expert].nonzero()[:, 0].tolist() == sorted(mine[: int(room[expert])])
    assert torch.equal(probs, free_probs * kept)


def test_what_layers_saw_is_told_of_this_rank_alone() -> None:
    """No process group is there: who asks for it may be the only one that asks."""
    _, router = routers()
    block = SimpleNamespace(experts=range(EXPERTS), prefix="layers.0", module=SimpleNamespace(router=router))
    watch = RouterWatch([block], None)  # type: ignore[list-item]
    router.routing(logits())
    watch.step()
    assert watch.shares()["layers.0.dense"]["routed"] == 0, "nothing was trained on yet"
    watch.commit()
    watch.step()
    ((name, tokens),) = watch.shares().items()
    assert name == "layers.0.dense"
    assert tokens == {"routed": 2 * TOKENS, "processed": watch.state[0, 1].sum().item(), "debt": 0.0}
    assert 0 < tokens["processed"] < tokens["routed"]


def test_evaluation_is_at_base_capacity() -> None:
    _, router = routers()
    _, base = router.routing(logits())
    router.boost = torch.full((EXPERTS,), 2.0, dtype=torch.float64)
    assert int(router.routing(logits())[1].sum()) > int(base.sum())
    router.eval()
    assert torch.equal(router.routing(logits())[1], base)


def test_no_capacity_passes_the_number_of_tokens() -> None:
    probs = torch.rand(4, 2)
    everything = torch.ones(4, 2, dtype=torch.bool)
    assert keep_mask(probs, everything, 3, torch.tensor([9.0, 1.0]), "probs").sum(dim=0).tolist() == [4, 3]


def test_padded_inputs_are_counted_by_their_probabilities() -> None:
    block = SimpleNamespace(experts=(0, 1), module=torch.nn.Module())
    block.module.config = config(moe_pad_expert_input_to_capacity=True)
    block.module.experts = torch.nn.Identity()
    block.module.weight = torch.nn.Parameter(torch.zeros(1))
    block.module.experts.forward = lambda tokens, per_expert, probs: tokens
    counters = TokenCounters([block])  # type: ignore[list-item]
    probs = torch.tensor([0.5, 0.2, 0.0, 0.1, 0.0, 0.0]).requires_grad_()
    block.module.experts(torch.zeros(6, 4), torch.tensor([3, 3]), probs)
    with torch.no_grad():
        block.module.experts(torch.zeros(6, 4), torch.tensor([3, 3]), probs)
    counters.commit()
    assert counters.totals[0].tolist() == [2, 1]
    counters.close()
    block.module.experts(torch.zeros(6, 4), torch.tensor([3, 3]), probs)
    counters.commit()
    assert counters.totals[0].tolist() == [2, 1]


def test_what_is_thrown_away_and_what_rehearses_a_graph_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    block = SimpleNamespace(experts=(0, 1), module=torch.nn.Module())
    block.module.config = config(moe_pad_expert_input_to_capacity=False)
    block.module.experts = torch.nn.Identity()
    block.module.weight = torch.nn.Parameter(torch.zeros(1))
    block.module.experts.forward = lambda tokens, per_expert: tokens
    counters = TokenCounters([block])  # type: ignore[list-item]
    assert counters.unseen() == [0]
    passes = lambda: block.module.experts(torch.zeros(6, 4), torch.tensor([4, 2]))
    monkeypatch.setattr(router_module, "is_graph_warmup", lambda: True)
    passes()
    assert counters.unseen() == [0]
    monkeypatch.setattr(router_module, "is_graph_warmup", lambda: False)
    passes()
    counters.discard()
    passes()
    passes()
    assert counters.totals[0].tolist() == [0, 0], "no step was taken yet"
    counters.commit()
    counters.commit()
    assert counters.totals[0].tolist() == [8, 4]
    assert counters.unseen() == []
    counters.close()


def test_a_router_tells_what_was_trained_on() -> None:
    _, router = routers()
    block = SimpleNamespace(experts=range(EXPERTS), prefix="layers.0", module=SimpleNamespace(router=router))
    watch = RouterWatch([block], None)  # type: ignore[list-item]
    for _ in range(3):
        router.routing(logits())
        watch.discard()
    router.routing(logits())
    watch.commit()
    watch.step()
    assert watch.state[0, 0].sum() == 2 * TOKENS


# -- into the layer spec -------------------------------------------------------------------------------------------


def block(*mlps: Any) -> SimpleNamespace:
    """A block spec of layers with these MLPs."""
    return SimpleNamespace(layer_specs=[SimpleNamespace(submodules=SimpleNamespace(mlp=mlp)) for mlp in mlps])


def moe() -> Any:
    """As this Megatron makes it: a ``ModuleSpec``, or a ``functools.partial`` of the class."""
    return get_moe_module_spec(use_te=False, num_experts=EXPERTS)


def parts_of(mlp: Any) -> Any:
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


def test_every_moe_layer_of_a_spec_gets_it_and_dense_layers_do_not() -> None:
    layers = [moe(), get_mlp_module_spec(use_te=False), moe()]
    use_capacity_router(block(*layers))
    assert [getattr(parts_of(layer), "router", None) for layer in layers] == [CapacityRouter, None, CapacityRouter]
    use_capacity_router(block(*layers))


@pytest.mark.parametrize("make", [lambda cls, parts: ModuleSpec(module=cls, submodules=parts), partial])
def test_specs_of_all_versions_are_known(make: Any) -> None:
    """Of 0.16 and of 0.19, whichever is installed."""
    cls, parts = MoELayer, MoESubmodules(experts=None)
    layer = make(cls, submodules=parts) if make is partial else make(cls, parts)
    use_capacity_router(block(layer))
    assert parts.router is CapacityRouter


def test_a_block_of_dense_layers_is_left_as_it_is() -> None:
    use_capacity_router(block(get_mlp_module_spec(use_te=False), IdentityOp, None))


def test_layers_of_multi_token_prediction_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inner layer is called one thing in megatron-core 0.16 and another in 0.19; the spec is Megatron's own."""
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda **_: True)
    settings = config(num_layers=2, mtp_num_layers=1, normalization="LayerNorm")
    decoder = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, pp_rank=0)
    predicts = copy.deepcopy(get_gpt_mtp_block_spec(settings, decoder, use_transformer_engine=False, pp_rank=0))
    (layer,) = predicts.layer_specs
    names = [name for name in ("mtp_model_layer", "transformer_layer") if hasattr(layer.submodules, name)]
    inner = getattr(layer.submodules, names[0])
    assert parts_of(inner.submodules.mlp).router is TopKRouter
    use_capacity_router(predicts)
    assert parts_of(inner.submodules.mlp).router is CapacityRouter
    setattr(layer.submodules, names[0], None)
    with pytest.raises(ConfigError, match=r"layer 0 of the spec has no 'mlp'.*MultiTokenPredictionLayer"):
        use_capacity_router(predicts)


def test_mamba_layers_are_left_as_they_are_and_others_without_an_mlp_are_not() -> None:
    layers = block(moe())
    layers.layer_specs.append(ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules()))
    use_capacity_router(layers)
    layers.layer_specs.append(ModuleSpec(module=torch.nn.Identity))
    with pytest.raises(ConfigError, match=r"layer 2 of the spec has no 'mlp' .*no Mamba layer.*Identity"):
        use_capacity_router(layers)


def test_nothing_is_left_out_without_a_word() -> None:
    with pytest.raises(ConfigError, match="looks for layer_specs, which ModuleSpec does not have"):
        use_capacity_router(ModuleSpec(module=MoELayer))
    with pytest.raises(ConfigError, match=r"no router in layer 1 .*'router' in submodules.*MoELayer"):
        use_capacity_router(block(moe(), ModuleSpec(module=MoELayer)))
    with pytest.raises(ConfigError, match="no router in layer 0"):
        use_capacity_router(block(lambda **_: None))
    own = moe()
    parts_of(own).router = type("OwnRouter", (TopKRouter,), {})
    with pytest.raises(ConfigError, match=r"layer 0 .*router of its own, OwnRouter"):
        use_capacity_router(block(own))


@pytest.mark.skipif("is_mtp_layer" not in signature(TopKRouter).parameters, reason="megatron-core 0.16 does not say it")
def test_a_router_knows_that_it_is_of_an_mtp_layer() -> None:
    assert CapacityRouter(config=config(), pg_collection=GROUPS, is_mtp_layer=True).is_mtp_layer


def test_layers_whose_capacity_cannot_be_raised_are_named() -> None:
    theirs, ours = routers()
    blocks = [
        SimpleNamespace(
            prefix=f"layers.{i}", module=SimpleNamespace(router=router, config=config(), token_dispatcher=0)
        )
        for i, router in enumerate((ours, theirs, theirs))
    ]
    rules = CapacityRules(iterations=1)
    assert RouterWatch(blocks[:1], rules).why_fixed is None  # type: ignore[arg-type]
    said = RouterWatch(blocks, rules).why_fixed  # type: ignore[arg-type]
    assert said is not None
    assert "2 of 3 MoE layers have no CapacityRouter, the first is layers.1 with TopKRouter" in said
    assert RouterWatch(blocks, None).why_fixed is None  # type: ignore[arg-type]

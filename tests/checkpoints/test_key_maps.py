"""The name maps against lists that are written out here, and against the models of diffusers and transformers."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import UMT5Config, UMT5EncoderModel

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.families import FAMILIES, family_of
from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.sampling.schedule import Schedule

LAYERS, DIM, FFN, TEXT, TIME = 30, 1536, 8960, 4096, 256  # Wan2.1-T2V-1.3B


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def wan_1_3b() -> dict[str, tuple]:
    """Every tensor of the original checkpoint with its shape."""
    shapes = {"patch_embedding.weight": (DIM, 16, 1, 2, 2), "patch_embedding.bias": (DIM,)}
    shapes |= linear("text_embedding.0", DIM, TEXT) | linear("text_embedding.2", DIM, DIM)
    shapes |= linear("time_embedding.0", DIM, TIME) | linear("time_embedding.2", DIM, DIM)
    shapes |= linear("time_projection.1", 6 * DIM, DIM)
    for block in (f"blocks.{n}." for n in range(LAYERS)):
        shapes[block + "modulation"] = (1, 6, DIM)
        for part in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                shapes |= linear(f"{block}{part}.{letter}", DIM, DIM)
            shapes |= {f"{block}{part}.norm_{x}.weight": (DIM,) for x in "qk"}
        shapes |= {f"{block}norm3.weight": (DIM,), f"{block}norm3.bias": (DIM,)}
        shapes |= linear(f"{block}ffn.0", FFN, DIM) | linear(f"{block}ffn.2", DIM, FFN)
    return shapes | {"head.modulation": (1, 2, DIM)} | linear("head.head", 64, DIM)


def umt5_xxl() -> dict[str, tuple]:
    """Every tensor of the original text encoder with its shape."""
    shapes = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for block in (f"blocks.{n}." for n in range(24)):
        shapes |= {f"{block}norm{n}.weight": (4096,) for n in (1, 2)}
        shapes |= {f"{block}attn.{letter}.weight": (4096, 4096) for letter in "qkvo"}
        shapes |= {f"{block}ffn.gate.0.weight": (10240, 4096), f"{block}ffn.fc1.weight": (10240, 4096)}
        shapes |= {f"{block}ffn.fc2.weight": (4096, 10240), f"{block}pos_embedding.embedding.weight": (32, 64)}
    return shapes


# A block of FastVideo's own naming, and what is outside of the blocks.
FASTVIDEO = {
    "to_q.weight": "self_attn.q.weight",
    "to_k.bias": "self_attn.k.bias",
    "to_v.weight": "self_attn.v.weight",
    "to_out.weight": "self_attn.o.weight",
    "to_out.bias": "self_attn.o.bias",
    "norm_q.weight": "self_attn.norm_q.weight",
    "norm_k.weight": "self_attn.norm_k.weight",
    "attn2.to_q.weight": "cross_attn.q.weight",
    "attn2.to_k.weight": "cross_attn.k.weight",
    "attn2.to_v.bias": "cross_attn.v.bias",
    "attn2.to_out.weight": "cross_attn.o.weight",
    "attn2.norm_q.weight": "cross_attn.norm_q.weight",
    "attn2.norm_k.weight": "cross_attn.norm_k.weight",
    "self_attn_residual_norm.norm.weight": "norm3.weight",
    "self_attn_residual_norm.norm.bias": "norm3.bias",
    "ffn.fc_in.weight": "ffn.0.weight",
    "ffn.fc_out.bias": "ffn.2.bias",
    "scale_shift_table": "modulation",
}
FASTVIDEO_OUTSIDE = {
    "patch_embedding.proj.weight": "patch_embedding.weight",
    "condition_embedder.text_embedder.fc_in.weight": "text_embedding.0.weight",
    "condition_embedder.text_embedder.fc_out.bias": "text_embedding.2.bias",
    "condition_embedder.time_embedder.mlp.fc_in.weight": "time_embedding.0.weight",
    "condition_embedder.time_embedder.mlp.fc_out.weight": "time_embedding.2.weight",
    "condition_embedder.time_modulation.linear.weight": "time_projection.1.weight",
    "scale_shift_table": "head.modulation",
    "proj_out.bias": "head.head.bias",
}


def shapes_of(module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_our_dit_has_the_tensors_of_the_published_one():
    with torch.device("meta"):
        ours = CausalDiT(ModelConfig.preset("wan2.1-t2v-1.3b"))
    table = wan_1_3b()
    assert shapes_of(ours) == table
    assert (len(table), sum(math.prod(s) for s in table.values())) == (825, 1_418_996_800)


def test_every_name_of_diffusers_is_found_with_its_shape():
    with torch.device("meta"):
        theirs = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=FFN, num_layers=LAYERS)
    assert {key_maps.to_wan(name): shape for name, shape in shapes_of(theirs).items()} == wan_1_3b()
    assert {key_maps.rename(name, key_maps.DIFFUSERS_KEYS): shape for name, shape in wan_1_3b().items()} == shapes_of(
        theirs
    )
    config = ModelConfig.from_dict(key_maps.from_diffusers_config(dict(theirs.config)))
    assert config == ModelConfig.preset("wan2.1-t2v-1.3b")


@pytest.mark.parametrize("dialect", key_maps.DIT_KEY_MAPS, ids=lambda d: d.name)
def test_a_dialect_renames_back_and_is_recognized(dialect):
    renamed = [key_maps.rename(name, dialect) for name in wan_1_3b()]
    assert len(set(renamed)) == 825
    assert [key_maps.to_wan(name) for name in renamed] == list(wan_1_3b())
    assert key_maps.dialect_of(renamed) == dialect.name and key_maps.kind_of(renamed) == key_maps.DIT


def test_fastvideos_names_are_those_of_its_own_list():
    for number in (0, 7, 29):
        for theirs, ours in FASTVIDEO.items():
            assert key_maps.to_wan(f"blocks.{number}.{theirs}") == f"blocks.{number}.{ours}"
    assert {theirs: key_maps.to_wan(theirs) for theirs in FASTVIDEO_OUTSIDE} == FASTVIDEO_OUTSIDE


@given(
    st.sampled_from(sorted(wan_1_3b())),
    st.lists(st.sampled_from(sorted(key_maps.PREFIXES)), max_size=3),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(key_maps.WRAPPERS))), max_size=4),
    st.sampled_from(key_maps.DIT_KEY_MAPS),
)
def test_wrappers_anywhere_and_prefixes_in_front_are_stripped(name, prefixes, wrappers, dialect):
    words = [*prefixes, *key_maps.rename(name, dialect).split(".")]
    for place, wrapper in wrappers:
        words.insert(min(place, len(words) - 1), wrapper)
    assert key_maps.to_wan(".".join(words)) == name


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="both called 'head.head.bias'"):
        key_maps.wan_names({"model.head.head.bias": 1, "proj_out.bias": 2})


def test_umt5_has_the_tensors_of_the_published_one():
    with torch.device("meta"):
        theirs = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    table = umt5_xxl()
    assert (len(table), sum(math.prod(s) for s in table.values())) == (242, 5_680_910_336)
    shapes = shapes_of(theirs)
    shapes.pop("encoder.embed_tokens.weight")  # the same parameter as shared.weight
    assert {key_maps.rename(name, key_maps.UMT5_KEYS): shape for name, shape in table.items()} == shapes
    assert key_maps.kind_of(table) == key_maps.kind_of(shapes) == key_maps.TEXT


@functools.cache
def kinds():
    return list(files())


def files():
    """(kind, the names of a file of it)."""
    with torch.device("meta"):
        config = ModelConfig.preset("shapes")
        dit = CausalDiT(config).state_dict()
        yield key_maps.DIT, dit
        yield key_maps.DIT, {f"model.diffusion_model.{name}": 0 for name in dit}
        yield key_maps.ENGINE, {**{f"generator.{name}": 0 for name in dit}, "confidence.mlp.0.weight": 0}
        yield key_maps.IMAGE_DIT, {**dit, "img_emb.proj.0.weight": 0}
        yield key_maps.IMAGE_DIT, {**dit, "blocks.3.attn2.add_k_proj.weight": 0}
        yield key_maps.LORA, {"base_model.model.blocks.0.ffn.0.lora_A.weight": 0}
        yield key_maps.LORA, {"diffusion_model.blocks.0.ffn.0.lora_down.weight": 0}
        yield key_maps.HEAD, PooledHead(config).state_dict()
        yield key_maps.WAN_VAE, WanVAE(dim=8).state_dict()
        yield key_maps.DIFFUSERS_VAE, AutoencoderKLWan(base_dim=8).state_dict()
        yield key_maps.TAEHV, TAEHV().state_dict()
        yield key_maps.PROMPTS, {"prompt_embeds": 0}
        yield None, {"visual.transformer.resblocks.0.attn.in_proj_weight": 0}
        yield None, {}


@pytest.mark.parametrize("number", range(14))
def test_a_file_is_recognized_by_its_names(number):
    kind, tensors = kinds()[number]
    assert key_maps.kind_of(tensors) == kind


@pytest.mark.parametrize(
    "family, chunk, window, sink, timesteps",
    [
        ("self-forcing", 3, None, 0, [1000, 937.5, 833.33, 625]),
        ("longlive", 3, 12, 3, [1000, 937.5, 833.33, 625]),
        ("krea", 3, 6, 0, [1000, 937.5, 833.33, 625]),
        ("causvid", 3, None, 0, [1000, 757, 522]),
        ("streamdiffusionv2", 3, 21, 0, [1000, 750, 500, 250]),
    ],
)
def test_a_family_is_rolled_out_as_its_project_does_it(family, chunk, window, sink, timesteps):
    rollout = FAMILIES[family].rollout
    assert (rollout.chunk_frames, rollout.window, rollout.sink) == (chunk, window, sink)
    warped = [1000 * sigma for sigma in Schedule(rollout.steps, rollout.shift).sigmas]
    assert warped == pytest.approx(timesteps, abs=0.01)


def test_the_base_model_is_a_family_too():
    rollout = FAMILIES["wan"].rollout
    assert (len(Schedule(rollout.steps, rollout.shift)), rollout.chunk_frames) == (50, 21)


@pytest.mark.parametrize(
    "words, classes, family",
    [
        (["self_forcing_dmd.pt", "checkpoints"], [], "self-forcing"),
        (["diffusion_pytorch_model.safetensors", "Wan2.1-T2V-1.3B"], ["WanModel"], "wan"),
        (["self_forcing_dmd.pt", "Wan2.1-T2V-1.3B"], ["WanModel"], "self-forcing"),
        (["SFWan2.1-T2V-1.3B-Diffusers"], [], "self-forcing"),
        (["anything"], ["WanDMDPipeline", "CausalWanTransformer3DModel"], "self-forcing"),
        (["Wan2.1-T2V-1.3B-Diffusers"], ["WanPipeline", "WanTransformer3DModel"], "wan"),
        (["longlive_base.pt", "models"], [], "longlive"),
        (["model.pt", "LongLive-1.3B"], [], "longlive"),
        (["krea-realtime-video-14b.safetensors", "checkpoints"], [], "krea"),
        (["model.pt", "wan_causal_dmd_v2v"], [], "streamdiffusionv2"),
        (["model.pt", "autoregressive_checkpoint"], [], "causvid"),
        (["model.pt", "out"], [None, "WanModel"], None),
    ],
)
def test_a_family_is_inferred_from_public_names(words, classes, family):
    inferred, source = family_of(words, classes)
    assert inferred == family and source


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_dim": 1280}, "image_dim=1280: only text-to-video"),
        ({"added_kv_proj_dim": 1536}, "added_kv_proj_dim=1536"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False"),
        ({"qk_norm": None}, "qk_norm=None"),
        ({"attention_head_dim": None}, "lacks attention_head_dim"),
    ],
)
def test_a_diffusers_config_of_another_model_is_refused(changes, words):
    values = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 64, **changes}
    with pytest.raises(ValueError, match=words):
        key_maps.from_diffusers_config(values)

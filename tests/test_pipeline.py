"""The public API: parity of a whole rollout with code that is not ours, shapes and types of outputs, bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from safetensors.torch import save_file

from dsa_engine import Budget, Confidence, Fixed, PerChunk, Pipeline, Relative

FRAMES, CHUNKS, HEIGHT, WIDTH = 3, 4, 4, 6
RAW = (1000, 750, 500, 250)
SIZES = dict(
    dim=96, ffn_dim=160, num_heads=3, num_layers=2, freq_dim=64, in_dim=16, out_dim=16, text_len=12, text_dim=40
)
PROMPT = "a red circle moves sideways"


@pytest.fixture(scope="module")
def skyreels():
    """A block-causal video model of diffusers with random weights: chunks of FRAMES latent frames see the past."""
    torch.manual_seed(3)
    model = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=40,
        freq_dim=64,
        ffn_dim=160,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        num_layers=2,
        rope_max_seq_len=1024,
    )
    for parameter in model.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.1)
    model._set_ar_attention(FRAMES)
    return model


@pytest.fixture(scope="module", params=["safetensors, diffusers' names", "pt, Self-Forcing's dictionary"])
def checkpoint(request, skyreels, tmp_path_factory):
    """The same weights as a file, with a Wan-style config.json beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {"_class_name": "WanModel", "model_type": "t2v", "eps": 1e-06, **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    if request.param.startswith("safetensors"):
        save_file(skyreels.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"
    from dsa_engine.checkpoints.key_maps import wan_names

    inner = {f"model._fsdp_wrapped_module.{k}": v for k, v in wan_names(skyreels.state_dict()).items()}
    wrong = {k: torch.zeros_like(v) for k, v in inner.items()}
    torch.save({"generator": wrong, "generator_ema": inner, "step": 7}, folder / "self_forcing_dmd.pt")
    return folder / "self_forcing_dmd.pt"


def grid_sigma(raw: float, shift: float) -> float:
    """The level of a raw timestep as Self-Forcing looks it up: row 1000 - raw of a shifted 1000-step grid."""
    grid = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    return (shift * grid / (1 + (shift - 1) * grid))[1000 - int(raw)].item()


def reference_rollout(model, noise, embeds, counts, renoise, shift):
    """Self-Forcing's loop with the whole clip in every forward: the clean past at timestep 0, the chunk at its own."""
    embeds = torch.nn.functional.pad(embeds, (0, 0, 0, SIZES["text_len"] - embeds.shape[1]))
    done = noise[:, :0]
    for chunk, count in enumerate(counts):
        x = noise[:, chunk * FRAMES : (chunk + 1) * FRAMES]
        for step in range(count):
            sigma = grid_sigma(RAW[step], shift)
            t = torch.zeros(len(noise), done.shape[1] + FRAMES)
            t[:, -FRAMES:] = 1000 * sigma
            sample = torch.cat((done, x), dim=1).transpose(1, 2)
            velocity = model(sample, t, embeds, enable_diffusion_forcing=True, return_dict=False)[0].transpose(1, 2)
            x0 = (x.double() - sigma * velocity[:, -FRAMES:].double()).float()
            if step + 1 < count:
                after = grid_sigma(RAW[step + 1], shift)
                x = (1 - after) * x0 + after * renoise(chunk, step)
        done = torch.cat((done, x0), dim=1)
    return done


@pytest.mark.parametrize("shift", [5.0, 8.0])
@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (4, 2, 1, 3)])
def test_a_rollout_equals_that_of_a_block_causal_model_of_diffusers(checkpoint, skyreels, close, counts, shift):
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32, shift=shift)
    noise, embeds = torch.randn(2, CHUNKS * FRAMES, 16, HEIGHT, WIDTH), torch.randn(2, 9, 40)
    table = torch.randn(CHUNKS, 3, 2, FRAMES, 16, HEIGHT, WIDTH)
    expected = reference_rollout(skyreels, noise, embeds, counts, lambda c, s: table[c, s], shift)
    policy = Fixed(4) if counts == (4, 4, 4, 4) else PerChunk(list(counts))
    as_callable = pipe.generate_latents(noise, embeds, renoise=lambda c, s: table[c, s], step_policy=policy)
    close(as_callable, expected, 1e-4)
    as_tensor = pipe.generate_latents(
        noise, embeds, renoise=table.permute(1, 2, 0, 3, 4, 5, 6).flatten(2, 3), step_policy=policy
    )
    assert as_tensor.equal(as_callable)


def test_one_renoise_tensor_serves_every_step(checkpoint, skyreels, close):
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu")
    noise, given = torch.randn(2, 1, CHUNKS * FRAMES, 16, HEIGHT, WIDTH).unbind(0)
    embeds = torch.randn(1, 12, 40)
    expected = reference_rollout(
        skyreels, noise, embeds, (3,) * 4, lambda c, s: given[:, c * FRAMES : (c + 1) * FRAMES], shift=5.0
    )
    close(pipe.generate_latents(noise, embeds, renoise=given, step_policy="fixed:3"), expected, 1e-4)


def test_a_window_as_long_as_the_clip_is_global_attention_and_a_shorter_one_is_not(checkpoint):
    noise, embeds = torch.randn(1, CHUNKS * FRAMES, 16, HEIGHT, WIDTH), torch.randn(1, 12, 40)
    whole, named, long, short = (
        Pipeline.from_pretrained(checkpoint, device="cpu", window=w, sink=0).generate_latents(noise, embeds)
        for w in (None, -1, CHUNKS * FRAMES, 6)
    )
    assert whole.equal(long) and whole.equal(named)
    assert whole[:, :6].equal(short[:, :6])
    assert not whole[:, 6:].equal(short[:, 6:])


def test_output_types_show_the_same_video(pipe):
    shown = {kind: pipe(PROMPT, seed=4, output_type=kind).frames for kind in ("np", "pt", "pil", "latent")}
    assert shown["np"].shape == (1, 12, 64, 64, 3) and shown["np"].dtype == np.float32
    assert 0 <= shown["np"].min() <= shown["np"].max() <= 1
    np.testing.assert_array_equal(shown["pt"].permute(0, 1, 3, 4, 2).numpy(), shown["np"])
    np.testing.assert_allclose(np.stack(shown["pil"][0]), 255 * shown["np"][0], atol=0.51)
    decoded, _ = pipe.engine.decoder.decode(shown["latent"])
    torch.testing.assert_close(decoded, shown["pt"])


def test_stream_session_and_call_make_the_same_video(pipe):
    called = pipe(PROMPT, seed=4, step_policy=Fixed(3), num_frames=24)
    streamed = list(pipe.stream(PROMPT, seed=4, step_policy=Fixed(3), num_frames=24))
    assert [c.steps for c in streamed] == called.steps_per_chunk[0] == [3] * 8
    assert [c.confidence for c in streamed] == called.confidence[0]
    frames = np.concatenate([c.frames for c in streamed])
    np.testing.assert_allclose(frames, 255 * called.frames[0], atol=0.51)


def test_prompts_of_a_batch_do_not_touch_each_other(pipe, close):
    """Rows leave the batch at different steps; each still gets what it gets alone, up to the order of sums."""
    prompts, policy = [PROMPT, "a blue square jumps on navy", "a cyan cross rests"], Confidence(0.1)
    together = pipe(prompts, seed=10, step_policy=policy, output_type="latent")
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=10 + i, step_policy=policy, output_type="latent")
        assert together.steps_per_chunk[i] == alone.steps_per_chunk[0]
        close(together.frames[i], alone.frames[0], 1e-4)
    assert len({n for row in together.steps_per_chunk for n in row}) > 1


def test_seeds(pipe):
    def latents(**options):
        return pipe(PROMPT, output_type="latent", **options).frames

    assert latents(seed=5).equal(latents(seed=5))
    assert not latents(seed=5).equal(latents(seed=6))
    assert latents(seed=5).equal(latents(generator=torch.Generator().manual_seed(5)))


def test_the_callback_sees_every_step(pipe):
    seen = []
    pipe(
        PROMPT,
        num_frames=6,
        step_policy=PerChunk([2, 4]),
        callback_on_step_end=lambda p, step, t, kw: seen.append((step, round(t), tuple(kw["latents"].shape))),
    )
    shape = (1, 3, 16, 8, 8)
    assert seen == [(0, 1000, shape), (1, 900, shape), *[(i, t, shape) for i, t in enumerate((1000, 900, 750, 500))]]


def test_knobs_make_policies(pipe):
    steps = {
        "fixed": pipe(PROMPT, step_policy="fixed").steps_per_chunk,
        "two": pipe(PROMPT, step_policy="fixed", num_inference_steps=2).steps_per_chunk,
        "ceiling": pipe(PROMPT, step_policy="dsa", num_inference_steps=3, confidence_threshold=1.0).steps_per_chunk,
        "floor": pipe(PROMPT, min_steps=2, confidence_threshold=0.0).steps_per_chunk,
    }
    assert steps == {"fixed": [[4] * 4], "two": [[2] * 4], "ceiling": [[3] * 4], "floor": [[2] * 4]}


def test_one_thread_for_a_small_model_and_torchs_own_for_a_large_one(pipe, checkpoint, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert pipe.cpu_threads == 1
    assert Pipeline.from_pretrained(checkpoint, device="cpu").cpu_threads == 7  # 3 frames of 30 x 52 tokens, dim 96


BAD_CALLS = {
    "size": (dict(height=60), ["60x64", "multiples of 16", "64x64"]),
    "tiny": (dict(height=0, width=8), ["16"]),
    "frames": (dict(num_frames=10), ["num_frames=10", "chunks of 3", "nearest is 9"]),
    "no frames": (dict(num_frames=0), ["num_frames=0", "nearest is 3"]),
    "float frames": (dict(num_frames=9.5), ["num_frames=9.5", "whole number"]),
    "steps 0": (dict(step_policy="fixed", num_inference_steps=0), ["n=0", "1 to 4", "nearest is 1"]),
    "steps 9": (dict(step_policy="fixed", num_inference_steps=9), ["n=9", "1 to 4", "nearest is 4"]),
    "policy": (dict(step_policy="magic"), ["magic", "dsa", "relative"]),
    "relative": (
        dict(step_policy="relative", confidence_threshold=0.5),
        ["confidence_threshold=0.5", "'relative'", "use 'dsa'"],
    ),
    "relative bounds": (dict(step_policy="relative", min_steps=3, max_steps=2), ["max_steps=2", "nearest is 3"]),
    "threshold": (dict(confidence_threshold=1.2), ["threshold=1.2", "[0, 1]", "nearest is 1.0"]),
    "twice": (dict(step_policy=Fixed(2), min_steps=1), ["min_steps", "one or the other"]),
    "guidance": (dict(guidance_scale=3.0), ["guidance_scale=3.0", "1.0"]),
    "seed": (dict(seed=-1), ["seed=-1", "nearest is 0"]),
    "two seeds": (dict(seed=1, generator=torch.Generator()), ["seed=1", "one or the other"]),
    "text seed": (dict(seed="x"), ["seed='x'", "integer"]),
    "output": (dict(output_type="gif"), ["gif", "np, pt, pil, latent"]),
    "latents shape": (dict(latents=torch.zeros(1, 4, 16, 8, 8)), ["[1, 4, 16, 8, 8]", "of 3", "[1, 3, 16, 8, 8]"]),
    "latents channels": (dict(latents=torch.zeros(1, 3, 4, 8, 8)), ["[1, 3, 4, 8, 8]", "C = 16"]),
    "latents axes": (dict(latents=torch.zeros(3, 16, 8, 8)), ["[3, 16, 8, 8]", "[B, F, C, H, W]"]),
    "latents patch": (dict(latents=torch.zeros(1, 3, 16, 7, 8)), ["7x8", "multiples of the patch 2", "8x8"]),
    "latents dtype": (dict(latents=torch.zeros(1, 3, 16, 8, 8, dtype=torch.int64)), ["int64", "floating point"]),
    "latents type": (dict(latents=[1, 2]), ["list", "tensor"]),
    "latents batch": (dict(latents=torch.zeros(2, 3, 16, 8, 8)), ["2 clips", "1 prompts"]),
    "renoise": (dict(latents=torch.zeros(1, 3, 16, 8, 8), renoise=torch.zeros(2)), ["[2]", "[1, 3, 16, 8, 8]"]),
    "renoise call": (dict(renoise=lambda c, s: torch.zeros(1), step_policy="fixed"), ["renoise(0, 0)", "[1, 3,"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_name_the_value_the_rule_and_the_nearest(pipe, name):
    arguments, words = BAD_CALLS[name]
    with pytest.raises(ValueError) as error:
        pipe(PROMPT, **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("prompt", ["", "   ", [], [PROMPT, ""], None, 3])
def test_empty_prompts(pipe, prompt):
    with pytest.raises((ValueError, TypeError), match="prompt"):
        pipe(prompt)


def test_a_prompt_outside_the_grammar_shows_the_grammar_and_the_nearest(pipe):
    with pytest.raises(ValueError, match=re.escape("<circle|square|triangle|cross>")) as error:
        pipe("a red circel moves sideway")
    assert "a red circle moves sideways" in str(error.value)


def test_a_model_without_head_decoder_or_text_says_what_it_cannot_do(checkpoint):
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu")
    embeds, noise = torch.randn(1, 12, 40), torch.randn(1, 3, 16, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="no text encoder"):
        pipe(PROMPT, output_type="latent", latents=noise)
    with pytest.raises(ValueError, match="no decoder"):
        pipe(prompt_embeds=embeds, latents=noise)
    with pytest.raises(ValueError, match="no decoder"):
        pipe.session(prompt_embeds=embeds, num_frames=9)
    for policy in (Confidence(0.5), Budget(16), Relative(), "dsa", "relative", "relative:max"):
        with pytest.raises(ValueError, match="needs a confidence head"):
            pipe.generate_latents(noise, embeds, step_policy=policy)
    with pytest.raises(ValueError, match=re.escape("[B, L, 40]")):
        pipe.generate_latents(noise, torch.randn(1, 12, 41))


def test_bad_places_to_load_from(tmp_path, untrained):
    with pytest.raises(FileNotFoundError, match="nowhere.*neither a shipped model"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "dsa_engine/9"}))
    with pytest.raises(ValueError, match="dsa_engine/9"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other/9"}))  # another tool's
    with pytest.raises(FileNotFoundError, match="a folder without a model"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((untrained / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((untrained / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors"):
        Pipeline.from_pretrained(tmp_path)
    for bad in (dict(window=2), dict(window=6, sink=4), dict(shift=0.0), dict(steps=(900, 500)), dict(chunk_frames=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Pipeline.from_pretrained(untrained, **bad)

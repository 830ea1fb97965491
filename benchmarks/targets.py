"""What this engine sets out to reach with Wan2.1-T2V-1.3B at 480 x 832 on one Hopper GPU, and whether a run of
`fps.py` has reached it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MODEL, SIZE, HOPPER = "wan2.1-t2v-1.3b", [480, 832], "9.0"  # compute capability


class Target(NamedTuple):
    """bound: the least value that holds or, with most, the largest; measured: its value in a run's figures."""

    name: str
    bound: float
    measured: Callable[[dict], float | None]
    most: bool = False


def fps(row: dict) -> float:
    """The figure to quote: with decoding and commits, without the copy to the host."""
    return row["fps"]["decode"]


def tail(row: dict) -> float:
    return row["chunk_ms"]["p99"] / row["chunk_ms"]["p50"]


def times_eager(result: dict, whose: str) -> float | None:
    row = result["baseline"].get("eager", {})
    return row["ratio"][whose]["median"] if "ratio" in row else None


def all_steps(row: dict) -> dict:
    """The figures of chunks that all take every step."""
    return list(row["fixed"].values())[-1]


TARGETS = (
    Target("fps, clip mean, fixed 4", 31.0, lambda r: fps(all_steps(r))),
    Target("fps, full window, fixed 4", 24.0, lambda r: fps(all_steps(r["steady"]))),
    Target("fps, clip mean, fixed 2", 39.0, lambda r: fps(r["fixed"]["2"]) if "2" in r["fixed"] else None),
    Target("fps, clip mean, a policy of 2.5 steps", 39.0, lambda r: fps(r) if r["mean_steps"] > 2.45 else None),
    Target("first frame after the text, the policy, ms", 140.0, lambda r: r["first_frame_ms"], most=True),
    Target("first frame after the text, fixed 4, ms", 140.0, lambda r: all_steps(r)["first_frame_ms"], most=True),
    Target("p99 / p50 of a chunk, full window, fixed 4", 1.1, lambda r: tail(all_steps(r["steady"])), most=True),
    Target("times eager, fixed 4", 1.8, lambda r: times_eager(r, "fixed")),
    Target("times eager, the policy", 1.8, lambda r: times_eager(r, "policy")),
    Target("latents against float32, PSNR dB", 45.0, lambda r: r["fidelity"]["psnr_db"]),
)


def measured(target: Target, result: dict) -> float | None:
    """None too where a run was stopped before it had the figure."""
    try:
        return target.measured(result)
    except (KeyError, IndexError):
        return None


def judged(result: dict) -> dict:
    """Each target with what was measured and whether it holds; of: what they are set for; there: whether this is it.

    measured is None where a run has no such figure, as one that was stopped, which holds nothing. Equal latents have no
    PSNR and hold.
    """
    gpu = result["machine"]["gpu"]
    there = (
        result["model"] == MODEL
        and result["size"] == SIZE
        and result["vae"] == "WanVAE"
        and gpu is not None
        and gpu["capability"] == HOPPER
    )
    rows = []
    for target in TARGETS:
        value = measured(target, result)
        holds = value is not None and (value <= target.bound if target.most else value >= target.bound)
        if "PSNR" in target.name and result.get("fidelity", {}).get("max_abs") == 0:
            holds = True
        rows.append(
            {"target": target.name, "at": "most" if target.most else "least", "bound": target.bound}
            | {"measured": value, "holds": holds}
        )
    return {"of": f"{MODEL}, {SIZE[0]} x {SIZE[1]}, Wan VAE, one Hopper GPU", "there": there, "list": rows}


def lines(found: dict) -> list[str]:
    """For people."""
    here = "" if found["there"] else "; this is something else, so nothing follows from it"
    out = [f"targets of {found['of']}{here}:"]
    for row in found["list"]:
        value = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        verdict = "holds" if row["holds"] else "does not hold"
        out.append(f"  {row['target']}: {value}, at {row['at']} {row['bound']:g}: {verdict}")
    return out

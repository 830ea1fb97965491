"""What the ablation says: one table of all heads and rules, and a picture of quality over evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common.cli import format_table
from benchmarks.common.plot import png_figure

THRESHOLD, RULE = "confidence:", "relative:"
# The paper's axis: evaluations of a clip of 7 blocks, each block's steps and its commit. It reports 23 for its rule and
# 35 for 4 fixed steps (two summaries of its full text; arXiv 2606.04432).
BLOCKS, PAPER_ADAPTIVE, PAPER_FIXED = 7, 23, 35
COLORS = {"pooled": "#d9480f", "token": "#08519c"}


def nfe(row: Mapping) -> float:
    return BLOCKS * row["passes"]


def labelled(part: Mapping) -> Iterator[tuple[str, str, dict]]:
    """Rows of a student that the table shows: head, rule, figures."""
    for name, row in part["baselines"].items():
        if name.startswith("fixed"):
            yield "-", name, row
    for head, found in part["heads"].items():
        for name, row in found["rows"].items():
            if name.startswith(RULE) or row["preset"]:
                yield head, row["preset"] or name, row


def delta(value: Mapping | None) -> str:
    if value is None:
        return "-"
    low, high = value["ci"]
    return f"{value['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def report(result: Mapping) -> list[str]:
    """The tables that go to stdout."""
    lines = []
    for student, part in result["students"].items():
        rivals = list(part["heads"])
        body = [["head", "rule", "steps", "NFE", "valid", "easy / hard steps", "motion", "distance to teacher"]]
        body[0] += ["minus fixed, equal NFE"]
        body[0] += ["minus 4 fixed", *(f"minus {name}" for name in rivals), "minus its thresholds"]
        for head, rule, row in labelled(part):
            against = row.get("versus", {})
            cells = [head, rule, f"{row['mean_steps']:.2f}", f"{nfe(row):.1f}", f"{row['valid']:.3f}"]
            cells += [f"{row['steps_easy']:.2f} / {row['steps_hard']:.2f}", f"{row['motion']:.3f}"]
            gap = row["distance"]
            cells += ["-" if gap is None else f"{gap['place']:.3f} / {gap['move']:.4f}"]
            cells += [delta(against.get(name)) for name in ("fixed", "fixed:4", *rivals, "its thresholds")]
            body.append(cells)
        lines += [
            f"student {student}, {result['clips']} clips; differences of valid, paired by clip",
            *format_table(body),
        ]
        body = [["head", "AUC hard", "Spearman", "calibration error", "median confidence by step", "rises"]]
        for head, found in part["heads"].items():
            if (s := found["signal"]) is None:
                continue
            medians = " ".join(f"{m:.2f}" for m in s["median_confidence_by_step"])
            body.append(
                [head, f"{s['auc_hard']:.3f}", f"{s['spearman']:.3f}", f"{s['calibration_error']:.2f}", medians]
            )
            body[-1].append("yes" if s["rises"] else "no")
        lines += [*format_table(body), ""]
    return lines


def draw(result: Mapping, path: Path) -> None:
    """A PNG: valid frames over evaluations, a panel for each student."""
    students = result["students"]
    with png_figure(path, 4.6 * len(students), 4.2) as figure:
        for axis, (student, part) in zip(
            figure.subplots(1, len(students), sharey=True, squeeze=False)[0], students.items()
        ):
            kinds = {"fixed": "#343a40", "random": "#adb5bd", "by_index": "#868e96", "x0_change": "#ced4da"}
            for kind, color in kinds.items():
                points = sorted((nfe(r), r["valid"]) for n, r in part["baselines"].items() if n.startswith(kind))
                style = {"marker": "o", "linewidth": 1.6} if kind == "fixed" else {"marker": ".", "linewidth": 0.8}
                axis.plot(*zip(*points), color=color, label=kind.replace("_", " "), markersize=4, **style)
            for head, found in part["heads"].items():
                rows, color = found["rows"], COLORS[found["kind"]]
                style = "-" if head.startswith("fitted") else "--"
                points = sorted((nfe(r), r["valid"]) for n, r in rows.items() if n.startswith(THRESHOLD))
                axis.plot(*zip(*points), style, color=color, label=f"{head}, thresholds", linewidth=1.6)
                points = [(nfe(r), r["valid"]) for n, r in rows.items() if n.startswith(RULE)]
                marker = "*" if head.startswith("fitted") else "P"
                axis.plot(*zip(*points), marker, color=color, label=f"{head}, relative", markersize=9)
            axis.axvline(PAPER_ADAPTIVE, color="#2b8a3e", linewidth=0.8, linestyle=":")
            axis.text(PAPER_ADAPTIVE, 0.802, " the paper's 23 of 35", color="#2b8a3e", fontsize=7)
            axis.set(title=f"student: {student}", xlabel="evaluations per 7 blocks, commits included")
            axis.set(xlim=(13, PAPER_FIXED + 1), ylim=(0.8, 1.003))
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=6, loc="lower right")
        figure.axes[0].set_ylabel("valid frames")

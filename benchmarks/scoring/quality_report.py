"""What the quality benchmark says: its claims, its tables and its plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.cli import format_table
from benchmarks.common.plot import png_figure

MAX_STEPS, BETTER, WORSE = 1.9, 0.03, -0.01  # of the claims, in mean steps and in valid frames


def claims(confidence: Sequence[dict], head: dict, limit: int) -> dict[str, dict]:
    """What step allocation is claimed to do, of the confidence row of the most mean steps up to MAX_STEPS: each claim
    with the figure, the rule, and whether it holds. Empty where no row has so few."""
    row = max((r for r in confidence if r["mean_steps"] <= MAX_STEPS), key=lambda r: r["mean_steps"], default=None)
    if row is None:
        return {}
    found = {f"mean steps (threshold {row['threshold']:g})": (row["mean_steps"], f"at most {MAX_STEPS}", True)}
    for name, versus_ in row["versus"].items():
        if versus_ is None:
            continue  # beyond the end of that curve
        value, above = (versus_["difference"], *versus_["ci"]), versus_["ci"][0] > 0
        if name == f"fixed:{limit}":
            verdict = f"at least {WORSE}", value[0] >= WORSE
        elif name == "fixed:2":
            verdict = f"at least {BETTER}, interval above 0", value[0] >= BETTER and above
        else:
            name, verdict = f"{name} at equal steps", ("interval above 0", above)
        found[f"valid less that of {name}"] = (value, *verdict)
    found["steps of hard chunks over those of easy ones"] = (row["ratio"], "at least 2", row["ratio"] >= 2)
    found["AUC of the head for hard chunks"] = (head["auc_hard"], "at least .93", head["auc_hard"] >= 0.93)
    found["Spearman with the true distance"] = (head["spearman"], "at least .8", head["spearman"] >= 0.8)
    return {text: dict(zip(("value", "rule", "holds"), verdict)) for text, verdict in found.items()}


COLUMNS = ("mean_steps", "steps_easy", "steps_hard", "ratio", "passes", "valid", "ci", "valid_easy", "valid_hard")
COLUMNS += ("all_valid", "motion", "mse", "texture", "steady", "seconds")


def report(result: dict) -> list[str]:
    """The tables that go to stdout."""
    columns = (*COLUMNS, "quarters") if result["chunks"] > 4 else COLUMNS
    rows = dict(labelled(result))
    lines = format_table([["policy", *columns], *([n, *(cell(c, r[c]) for c in columns)] for n, r in rows.items())])

    def difference(value: dict | None) -> str:
        return "-" if value is None else f"{value['difference']:+.3f} {cell('ci', value['ci'])}"

    lines += ["", "valid, confidence minus others, paired by clip; minus curves at equal mean steps"]
    body = [[name, *map(difference, r["versus"].values())] for name, r in rows.items() if "versus" in r]
    lines += format_table([["policy", *result["confidence"][0]["versus"]], *body])
    if result["compare"]:
        lines += ["", f"{result['compare']['label']} minus {result['model']}, paired by clip"]
        body = [["policy", "mean steps", "valid", "valid_hard", "valid of both", "inside"]]
        for name, r in result["compare"]["rows"].items():
            steps, valid = (
                " / ".join(f"{x:.{n}f}" for x in r[k][::-1]) for k, n in (("mean_steps", 2), ("valid_of", 3))
            )
            inside = "yes" if r["inside"] else "NO"
            body.append([name, steps, difference(r["valid"]), difference(r["valid_hard"]), valid, inside])
        lines += format_table(body)
        lines += [f"psnr, {way}: {row}" for way, row in (result["compare"]["psnr"] or {}).items()]
    lines += ["", *(f"{name}: {result[name]}" for name in FIGURES), ""]
    for text, claim in result["claims"].items():
        lines.append(f"{'yes' if claim['holds'] else 'NO ':3} {text}: {claim['value']} ({claim['rule']})")
    if result["teacher"] is None and not result["brief"]:
        lines += ["", "no teacher: none ships with the package; give --teacher FOLDER"]
    return lines


def cell(column: str, value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{v:.3f}' for v in value)}]"
    digits = {"mse": 5, "texture": 4, "seconds": 1}.get(column, 3)
    return "-" if value is None else f"{value:.{digits}f}"


FIGURES = ("auc_hard", "spearman", "spearman_by_step", "correlation", "correlation_by_step", "steps_event")
FIGURES += ("steps_quiet", "steps_by_kind", "head", "mix")


def labelled(result: dict) -> Iterator[tuple[str, dict]]:
    """(name, row) of every row of a result."""
    yield from ((f"fixed:{n}", r) for n, r in result["fixed"].items())
    for r in result["confidence"]:
        yield f"confidence:{r['threshold']:g}" + (f" {r['preset']}" if r["preset"] else ""), r
    yield from ((f"relative:{how}", r) for how, r in result.get("relative", {}).items())  # not in older files
    random, by_index, x0_change = result["baselines"].values()
    yield from ((f"random:{r['p']:g}", r) for r in random)
    yield from ((f"by_index:{','.join(map(str, r['counts']))}", r) for r in by_index)
    yield from ((f"x0_change:{r['threshold']:g}", r) for r in x0_change)
    yield from ((name, result[name]) for name in ("teacher", "ground_truth") if result[name])


PANELS = {"valid": "valid frames", "motion": "chunks that move as the prompt says"}
BLUE = "#1f5fbf"
STYLE = {"random": ("#9a6fb0", "^"), "by_index": ("#c98b2b", "s"), "x0_change": ("#3b8f5a", "D")}


def draw(result: dict, path: Path) -> None:
    """valid and motion over mean steps: fixed counts, confidence with its interval, relative, baselines, teacher,
    truth."""
    from matplotlib.patheffects import withStroke

    baselines = {kind: sorted(rows, key=lambda r: r["mean_steps"]) for kind, rows in result["baselines"].items()}
    chosen = sorted(result["confidence"], key=lambda r: r["mean_steps"])
    lines = {"fixed": (list(result["fixed"].values()), dict(color="#555555", marker="o", ls="--"))}
    for kind, (color, marker) in STYLE.items():
        lines[kind] = baselines[kind], dict(color=color, marker=marker, ms=4.5, lw=1, alpha=0.85)
    relative = sorted(result.get("relative", {}).values(), key=lambda r: r["mean_steps"])
    lines["relative"] = relative, dict(color="#b03a2e", marker="*", ms=8, ls="")
    lines["confidence"] = chosen, dict(color=BLUE, marker="o", ms=4, lw=2, zorder=5)
    with png_figure(path, 11, 4.6) as figure:
        for axes, (key, text) in zip(figure.subplots(1, 2), PANELS.items()):
            for label, (rows, style) in lines.items():
                axes.plot([r["mean_steps"] for r in rows], [r[key] for r in rows], label=label, **style)
            if key == "valid":
                steps, intervals = [r["mean_steps"] for r in chosen], zip(*(r["ci"] for r in chosen))
                axes.fill_between(steps, *intervals, color=BLUE, alpha=0.15, lw=0, label="its 95 % interval")
            for r in (r for r in chosen if r["preset"]):
                point, halo = (r["mean_steps"], r[key]), [withStroke(linewidth=2.5, foreground="white")]
                axes.plot(*point, "o", ms=9, mfc="none", mec=BLUE, mew=1.5, zorder=6)
                style = dict(color=BLUE, size=8, zorder=7, path_effects=halo)
                axes.annotate(r["preset"], point, (5, -13), textcoords="offset points", **style)
            for name, style in (("teacher", "-."), ("ground_truth", ":")):
                if row := result[name]:
                    label = f"teacher, {row['mean_steps']:g} steps" if name == "teacher" else "ground truth"
                    axes.axhline(row[key], color="#a03030", ls=style, lw=1.2, label=label)
            axes.set(xlabel="mean denoising steps per chunk", ylabel=text)
            axes.grid(alpha=0.25)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=8, fontsize=8)
        about = (
            f"{result['clips']} clips of {result['chunks']} chunks, {100 * result['mix']['hard']:.0f} % of them hard"
        )
        figure.suptitle(f"{result['model']}: {about}", size=11)

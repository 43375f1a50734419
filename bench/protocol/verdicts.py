"""What a record of the protocol says: how its stages ended, whether its numbers are right, what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from common.stages import latest, newest
from protocol.plan import STAGES


def ended(stage: str, lines: list[dict]) -> str:
    """How a stage ended, in a few words, from its lines."""
    if not lines:
        return "did not run"
    troubles = [line["ended"] for line in lines if "ended" in line]
    troubles += [f"{line.get('what', 'a part')} raised {line['error']}" for line in lines if "error" in line and "at" in line]
    troubles += ["its time was up" for line in lines if "stopped" in line][:1]
    if not troubles:
        return "done" if any("seconds" in line for line in lines) else "ended in the middle"
    return "; ".join(troubles[:3])


def checks(lines: list[dict]) -> Iterator[str]:
    """Whether what was timed is right: parity, noise, correctness, drift."""
    outcomes = Counter(line["outcome"] for line in lines if "test" in line)
    where = "by the interpreter, on the CPU" if latest(lines, "device") == "cpu" else "on the device"
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    yield f"parity {where}: {told}" if outcomes else "parity: NOT TESTED"
    checked = sum("fault" in line for line in lines)
    if faults := [line for line in lines if line.get("fault")]:
        yield f"correctness: {len(faults)} faults, the first {faults[0]['op']} by {faults[0]['kernel']}: {faults[0]['fault']}"
    elif checked:
        yield f"correctness: {checked} calls against float64, no faults"
    else:
        yield "correctness: NOT TESTED"
    for line in lines:
        if "noise" in line:
            same = line["noise"]["same_words"]
            yield "the noise of the Triton kernels is " + ("that of the CPU, bit for bit" if same else "NOT that of the CPU")
        if "relative_error" in line and str(line.get("what", "")).startswith("drift"):
            allowed = "as of bfloat16, below 2e-02" if line["relative_error"] < 2e-2 else "TOO MUCH for bfloat16"
            yield f"{line['what']}, {line['arm']}: {line['relative_error']:.1e}, {allowed}"


def speeds(lines: list[dict]) -> Iterator[str]:
    """What the rates say to do next; arms are compared within a stage."""
    best = {(line["what"], line["arm"]): line for line in lines if "rate" in line}
    gemm, copy_rate = latest(lines, "gemm_tflops"), latest(lines, "copy_gb_s")
    if (line := best.get(("all convolutions B64", "best"))) and gemm:
        share = line["rate"] / gemm
        advice = "convolutions first" if share < 0.65 else "folding and attention only" if share > 0.85 else "no clear case"
        yield f"convolutions reach {share:.0%} of a large product at batch 64: {advice}"
    norms = [line for (what, arm), line in best.items() if what.startswith(("norm ", "pair ")) and arm == "triton"]
    if norms and copy_rate:
        worst = min(norms, key=lambda line: line.get("cold_rate", line["rate"]))
        share = worst.get("cold_rate", worst["rate"]) / copy_rate
        advice = "tune it before anything else" if share < 0.7 else "good enough"
        yield f"group_norm_act by triton reaches {share:.0%} or more of a copy, cold: {advice} ({worst['what']})"
    steps = {(line["stage"], line["what"], line["arm"]): line for line in best_of_stages(lines)}
    for (stage, what, arm), theirs in sorted(steps.items()):
        if arm != "multibeta" and (ours := steps.get((stage, what, "multibeta"))):
            gain = theirs["median_ms"] / ours["median_ms"]
            yield f"{what}: {gain:.2f}x over {arm}" + (": no speed to claim" if gain < 1.05 else "")


def best_of_stages(lines: list[dict]) -> Iterator[dict]:
    """The timed steps of the U-Net, the latest of each arm in each stage: those that were timed in turn."""
    yield from {
        (line["stage"], line["what"], line["arm"]): line
        for line in lines
        if "rate" in line and line["what"].startswith("U-Net step")
    }.values()


def verdicts(lines: list[dict]) -> Iterator[str]:
    """How each stage ended, whether the numbers are right, and what they say to do next."""
    lines = newest(lines)
    for stage in STAGES:
        yield f"{stage}: {ended(stage, [line for line in lines if line['stage'] == stage])}"
    yield from checks(lines)
    if latest(lines, "small"):
        yield "tiny sizes: the protocol works; its times and rates mean nothing"
    else:
        yield from speeds(lines)
    for name, how in (latest(lines, "missing_peers") or {}).items():
        yield f"{name} was not there to compare with: {how}"

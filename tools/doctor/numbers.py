"""The numbers themselves, one weight at a time: NaN, scales, groups, zero points, rows that say nothing."""

import statistics

import torch
from torch import Tensor

from common.course.checkpoint import some
from common.formats import awq, gptq
from common.formats.packing import WORD, unpack_outputs
from common.formats.sparse import unpack
from tools.doctor.findings import Finding
from tools.doctor.reading import AGAIN, SCALES, Checkpoint
from tools.doctor.structure import Plan


def check_numbers(found: Checkpoint, plan: Plan | None, tokens: int) -> list[Finding]:
    """All findings that need the values; `tokens`: ids of the tokenizer, rows of the embedding beyond are padding."""
    bad, bad_scales, zero_scales, dead = [], [], [], []
    for name in found.tensors:
        if found.tensors[name].dtype.startswith(("I", "U", "BOOL")):
            continue
        value = found.read(name).float()
        if not value.isfinite().all():
            (bad_scales if SCALES.search(name) else bad).append(name)
        elif SCALES.search(name):
            if (value == 0).any():
                zero_scales.append(f"{name} ({(value == 0).sum().item()} of {value.numel()})")
        elif found.kind != "sparse":
            dead += _dead(name, value, plan, tokens)
    findings, layers, offsets = [], found.layers(), []
    for layer, parts in layers.items():
        problem = _check_layer(found, plan, layer, parts)
        if problem:
            findings.append(problem)
            continue
        tensors = {key: found.read(name) for key, name in parts.items()}
        weight, offset = _unpacked(found, tensors)
        offsets.append(offset)
        if weight.isfinite().all():
            dead += _dead(f"{layer}.weight", weight, plan, tokens)
    if found.kind == "sparse":
        for name in [n.removesuffix(".bitmask") for n in found.tensors if n.endswith(".bitmask")]:
            weight = unpack({key: found.read(f"{name}.{key}") for key in ("bitmask", "values", "shape")})
            dead += _dead(name, weight, plan, tokens)
    findings = _merge(findings)
    if bad:
        findings.append(Finding("NaN or inf", f"{some(bad)} hold numbers that are none", AGAIN))
    if bad_scales:
        seen = f"{some(bad_scales)} hold NaN or inf: their groups, and all that follows, are NaN"
        findings.append(Finding("NaN scale", seen, "Quantize again, with more damping or calibration data."))
    if zero_scales:
        seen = f"{some(zero_scales)}: every weight of these groups is 0"
        findings.append(Finding("zero scale", seen, "Quantize again: a scale of float16 under 6e-8 becomes 0."))
    if dead:
        seen = f"outputs that are always 0: {some(dead)}"
        findings.append(Finding("dead rows", seen, "From structured pruning? Then cut them out; else make it again."))
    return findings + _check_zeros(found, offsets)


def _dead(name: str, value: Tensor, plan: Plan | None, tokens: int) -> list[str]:
    if value.dim() != 2 or name.endswith((".bias",)):
        return []
    rows = (value == 0).all(dim=1)
    if (plan and name in (plan.embedding, plan.head)) or name in ("token_embd.weight", "output.weight"):
        rows = rows[:tokens]  # beyond are rows that pad the vocabulary
        if rows.sum() <= 1:  # the padding token's own row is 0 in many models
            return []
    return [f"{name} ({rows.sum().item()} of {len(rows)})"] if rows.any() else []


def _check_layer(found: Checkpoint, plan: Plan | None, layer: str, parts: dict[str, str]) -> Finding | None:
    """A packed layer whose tensors do not fit together, or not what the configuration says."""
    needed = ("qweight", "qzeros", "scales")
    if any(key not in parts for key in needed):
        gone = ", ".join(key for key in needed if key not in parts)
        return Finding("missing tensors", f"{layer} has no {gone}", AGAIN)
    shapes = {key: found.tensors[name].shape for key, name in parts.items()}
    groups, out = shapes["scales"]
    bits, said = found.settings.get("bits", 4), found.settings.get("group_size", 0)
    inputs = shapes["qweight"][0] if found.kind == "awq" else shapes["qweight"][0] * WORD // bits
    if "g_idx" in shapes:
        inputs = shapes["g_idx"][0]
    if plan and f"{layer}.weight" in plan.shapes:
        inputs = plan.shapes[f"{layer}.weight"][1]
    width = WORD * shapes["qweight"][0] / inputs if found.kind == "gptq" else WORD * shapes["qweight"][1] / out
    if width != bits and not found.settings.get("dynamic"):
        seen = f"{layer} has {width:g} bits a weight, config says {bits}"
        return Finding("wrong bits", seen, "Correct bits in config.json.")
    expected = 1 if said <= 0 else -(-inputs // said)
    if said and groups != expected and not found.settings.get("dynamic"):
        seen = f"{layer} has {groups} groups of {inputs // groups} inputs, config says group_size {said}"
        return Finding("wrong group_size", seen, f"Set group_size to {inputs // groups} in config.json.")
    if "g_idx" in parts:
        group = found.read(parts["g_idx"])
        if group.min() < 0 or group.max() >= groups:
            seen = f"{layer} names the groups {group.min()} to {group.max()}, there are {groups}"
            return Finding("g_idx out of range", seen, "Make it again; g_idx of static groups is input // group_size.")
    return None


def _merge(findings: list[Finding]) -> list[Finding]:
    """One finding for all layers that have the same fault."""
    by_name = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    return [
        Finding(name, f[0].seen + (f" (and {len(f) - 1} layers more)" if len(f) > 1 else ""), f[0].do)
        for name, f in by_name.items()
    ]


def _unpacked(found: Checkpoint, tensors: dict[str, Tensor]) -> tuple[Tensor, float | None]:
    """(the layer's weight, how far the mean code lies above the zero point as the format says it is; None: unclear)"""
    if found.kind == "awq":
        codes, zeros = unpack_outputs(tensors["qweight"]).float(), unpack_outputs(tensors["qzeros"]).float()
        group = torch.arange(len(codes)) // (len(codes) // len(zeros))
        return awq.unpack_linear(tensors), _offset(codes - zeros[group])
    bits, group_size = found.settings.get("bits", 4), found.settings.get("group_size", 0)
    bits, offset = gptq.stored_bits(tensors, bits), convention(found)[1]
    codes, zeros, group = gptq.unpack_codes(tensors, bits, group_size)
    difference = codes.float() - zeros.float()[group] - offset
    return gptq.unpack_linear(tensors, bits, offset, group_size), _offset(difference) if bits <= 4 else None


def convention(found: Checkpoint) -> tuple[str, int]:
    """(label of a GPTQ folder, what its stored zero points lack)"""
    label = found.settings.get("checkpoint_format") or found.settings.get("format") or "gptq"
    return label, gptq.OFFSET.get(label, 1)


def _offset(difference: Tensor) -> float | None:
    """The mean, where enough weights stand behind it to tell a difference of half a step."""
    error = difference.std().item() / difference.numel() ** 0.5
    return difference.mean().item() if error < 0.2 else None


def _check_zeros(found: Checkpoint, offsets: list[float | None]) -> list[Finding]:
    """A trained matrix has a mean of nearly zero: where its codes' mean is a step away, the zero points are."""
    known = [offset for offset in offsets if offset is not None]
    shift = statistics.median(known) if known else 0.0
    if abs(shift) < 0.5:
        return []
    seen = f"weights lie {shift:+.2f} steps from 0 in the median of {len(known)} layers"
    if found.kind == "gptq":
        label, offset = convention(found)
        other = "gptq_v2" if offset else "gptq"
        if abs(shift - (gptq.OFFSET[other] - offset)) < 0.5:
            return [
                Finding(
                    f"off-by-one zeros: {'v2 labelled as v1' if offset else 'v1 labelled as v2'}",
                    f"{seen}: checkpoint_format is {label!r}, the zero points are {other}'s",
                    f'Set checkpoint_format to "{other}" in config.json (and quantize_config.json).',
                )
            ]
    return [Finding("off-by-one zeros", seen, "Pack the zero points again as the format wants them.")]

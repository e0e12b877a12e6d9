"""P-SACPO: θ_q = q·θ_safe + (1−q)·θ_reward (paper section 5.2), streamed tensor by tensor."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from models.alignment.guards import PROBE
from models.artifacts import Policy
from models.errors import BadPolicy
from models.policy.headers import weights
from models.policy.weights import TOKENIZER, describe, intact
from models.stage import stage


@stage("merge.interpolate", version=1)
def interpolate(out: Path, safe: Policy, reward: Policy, q: float) -> Policy:
    """Write the weights q·safe + (1−q)·reward to `out`, summed in float32 and cast back once.

    q = 1 and q = 0 give the parents bit for bit. No more than one tensor of each parent is in memory.

    Raises:
        BadPolicy: the parents differ in tensors, shapes, types, vocabulary or template.
        Damaged: the files of a parent changed since it was made.
    """
    import torch
    from safetensors import safe_open

    for parent in (safe, reward):
        intact(parent.path, parent.digest)
    if safe.vocabulary != reward.vocabulary:
        raise BadPolicy(f"merge: {safe.path} and {reward.path} have different vocabularies or templates")
    for name in (file.name for file in safe.path.iterdir() if file.suffix == ".json" or file.name in TOKENIZER):
        if name == PROBE:
            continue
        shutil.copyfile(safe.path / name, out / name)
    files = [path.name for path in weights(safe.path)]
    if files != [path.name for path in weights(reward.path)]:
        raise BadPolicy(f"merge: {safe.path} and {reward.path} are sharded differently; save one of them again")
    for name in files:
        header, start = _header(safe.path / name)
        if header != _header(reward.path / name)[0]:
            raise BadPolicy(f"merge: {name} of {safe.path} and {reward.path} hold different tensors or shapes")
        # The header is copied, so the tensors are written one after the other in the order in which it places them
        places = sorted(((t["data_offsets"][0], key) for key, t in header.items() if key != "__metadata__"))
        with (
            safe_open(safe.path / name, "pt") as safe_file,
            safe_open(reward.path / name, "pt") as reward_file,
            (out / name).open("wb") as file,
        ):
            with (safe.path / name).open("rb") as head:
                file.write(head.read(start))
            for _, key in places:
                a, b = safe_file.get_tensor(key), reward_file.get_tensor(key)
                # Not computed for q = 0 and 1: 1·a + 0·b is NaN where b is infinite, and integers have no mean
                if q in (0, 1) or not a.is_floating_point():
                    mixed = b if q == 0 else a
                else:
                    mixed = (q * a.float() + (1 - q) * b.float()).to(a.dtype)
                # As bytes, since numpy has no bfloat16
                file.write(mixed.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    merged = replace(
        safe,
        name=f"merge q={q:g}",
        kind="merge",
        merge_weight=q,
        parents=(safe.digest, reward.digest),
        rows=0,
    )
    return describe(out, merged)


def _header(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return the header of a safetensors file (tensor → dtype, shape, data_offsets), and where its data start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def merge_pairs(before: list[Policy], frontier: list[Policy]) -> list[tuple[Policy, Policy]]:
    """Return what P-SACPO averages: for each policy before the last step, its child of the largest λ, and itself."""
    # λ = 0 hands a policy of the step before on, which is no child of the last step
    handed_on = {policy.digest for policy in before}
    made = [policy for policy in frontier if policy.digest not in handed_on]
    families = [(parent, [p for p in made if p.parents[:1] == (parent.digest,)]) for parent in before]
    return [(max(children, key=lambda p: p.lambda_), parent) for parent, children in families if children]

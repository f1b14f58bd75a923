"""The layout of an adapter and its file format (plain PEFT). Arrays only: no torch, no model.

An adapter state maps canonical PEFT names (``base_model.model.….lora_A.weight``) to fp32 arrays. ``AdapterSpec`` fixes
names, shapes and base model; anything that does not match it exactly is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from common.errors import AdapterError
from common.messages import Tensors

AdapterState = dict[str, npt.NDArray[np.float32]]
"""Canonical name → fp32 array, C-contiguous."""

WEIGHTS_FILE = "adapter_model.safetensors"
MAP_FILE = "feature_map.safetensors"
"""The public feature map, where there is one; beside the weights, since PEFT knows no such tensors."""
FEATURE_MAP = "feature_map."
"""How the names of the map's tensors start."""
CARD_FILE = "consilium.json"


@dataclass(frozen=True)
class AdapterSpec:
    """Names and shapes of all tensors an adapter consists of, and the base model it belongs to."""

    base_digest: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Pairs (name, shape) in name order."""

    @classmethod
    def of(cls, base_digest: str, shapes: Mapping[str, tuple[int, ...]]) -> AdapterSpec:
        """The spec of the given tensors."""
        return cls(base_digest, tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(name for name, _ in self.shapes)

    def digest(self) -> str:
        """SHA-256 over base digest, names and shapes."""
        return hashlib.sha256(json.dumps([self.base_digest, self.shapes]).encode()).hexdigest()

    def part(self, names: Iterable[str]) -> AdapterSpec:
        """The spec of some of the tensors."""
        chosen = set(names)
        return AdapterSpec(self.base_digest, tuple(pair for pair in self.shapes if pair[0] in chosen))

    def at_rank(self, rank: int) -> AdapterSpec:
        """The same adapter with LoRA pairs of another rank."""
        return AdapterSpec(self.base_digest, tuple((name, _at_rank(name, shape, rank)) for name, shape in self.shapes))

    def check(self, tensors: Tensors, what: str) -> None:
        """Refuses tensors that do not have exactly these names and shapes in fp32.

        Raises:
            AdapterError: naming ``what`` and the first tensor that differs.
        """
        expected = dict(self.shapes)
        missing = sorted(expected.keys() - tensors.keys())
        unknown = sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            first = f"'{missing[0]}' is missing" if missing else f"'{unknown[0]}' is not part of it"
            raise AdapterError(
                f"{what}: another layout than the plan's: {first} ({len(missing)} missing, {len(unknown)} unknown); "
                "use an adapter made with the same model, task and [lora] settings"
            )
        for name, shape in self.shapes:
            array = tensors[name]
            if tuple(array.shape) != shape or array.dtype != np.float32:
                raise AdapterError(
                    f"{what}: '{name}' is {array.dtype}{list(array.shape)}, expected float32{list(shape)}; "
                    "use an adapter made with the same model, task and [lora] settings"
                )


def lora_pairs(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The names of B and A of each LoRA pair of which both are there, sorted."""
    known = set(names)
    pairs = ((name, name.replace(".lora_B.", ".lora_A.")) for name in sorted(known) if ".lora_B." in name)
    return tuple((b, a) for b, a in pairs if a in known)


def rank_of(tensors: Tensors) -> int | None:
    """The rank of the first LoRA pair; ``None`` without one. That all pairs share it, a spec's check says."""
    return next((int(tensors[a].shape[0]) for _, a in lora_pairs(tensors)), None)


def _at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if ".lora_A." in name:
        return (rank, *shape[1:])
    return (*shape[:1], rank) if ".lora_B." in name else shape


def orthonormal_rows(rows: int, columns: int, seed: int, name: str) -> npt.NDArray[np.float32]:
    """A matrix [rows, columns] with orthonormal rows (rows ≤ columns), a pure function of the public seed and the name.

    QR of a Gaussian matrix with the signs of R's diagonal fixed, i.e. Haar-distributed (Mezzadri 2007, arXiv
    math-ph/0609050, eq. 5.2).
    """
    if rows > columns:
        raise AdapterError(f"lora.r = {rows} exceeds the input width {columns} of '{name}'; choose a smaller rank")
    q, r = np.linalg.qr(_generator(seed, name).standard_normal((columns, rows)))
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T, dtype=np.float32)


def kaiming_rows(rows: int, columns: int, seed: int, name: str) -> npt.NDArray[np.float32]:
    """LoRA's usual start of A [rows, columns]: uniform in ±1/√columns (He et al. 2015, a = √5), public seed."""
    bound = 1.0 / np.sqrt(columns)
    return np.ascontiguousarray(_generator(seed, name).uniform(-bound, bound, (rows, columns)), dtype=np.float32)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def save_adapter(folder: Path, state: Tensors, peft_config: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Writes a plain PEFT adapter folder plus ``consilium.json`` (task, labels, pooling, base digest, privacy)."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(state[name]) for name in sorted(state)}
    mapped = {name: array for name, array in whole.items() if name.startswith(FEATURE_MAP)}
    save_file({name: array for name, array in whole.items() if name not in mapped}, folder / WEIGHTS_FILE)
    if mapped:
        save_file(mapped, folder / MAP_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")


def load_adapter(folder: Path) -> tuple[AdapterState, dict[str, Any]]:
    """State and card of an adapter folder.

    Raises:
        AdapterError: a file is missing or cannot be read.
    """
    for name in (WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"adapter {folder}: {name} is missing; give the DIR/adapter folder of a finished run")
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        mapped = load_file(folder / MAP_FILE) if (folder / MAP_FILE).is_file() else {}
        return {**load_file(folder / WEIGHTS_FILE), **mapped}, card
    except Exception as error:
        raise AdapterError(f"adapter {folder}: cannot be read ({error}); copy the folder again") from None

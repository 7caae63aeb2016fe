"""A bare loop that averages models of safetensors, for orientation: ``python merge_bare.py OUT FOLDER...``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    merged = {}
    with ExitStack() as stack:
        models = []
        for folder in folders:
            files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
            models.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
        for name in models[0]:
            first, *others = (model[name].get_tensor(name) for model in models)
            total = first.float()
            for other in others:
                total += other
            merged[name] = total.div_(len(models)).to(first.dtype)
        out.mkdir(parents=True, exist_ok=True)
        save_file(merged, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

"""Compile every kernel in every configuration for every architecture, and write what each takes.

The table goes to docs/kernel_resources.json. No GPU is needed; it takes some minutes. Nothing
is written if a configuration has to be removed from weaver/kernels/gpu/configurations.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from weaver.kernels.gpu.compile import all_cases, measure, problems, write_table

OUT = Path("docs/kernel_resources.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = []
    refused = 0
    for case in all_cases():
        resources = measure(case)
        found.append(resources)
        for problem in problems(resources):
            refused += 1
            print(f"{case.kernel} {case.config} {case.arch} {case.dtype}: {problem}", flush=True)
    if refused:
        raise SystemExit(f"{refused} problems in {len(found)} compiled kernels")
    write_table(found, arguments.out)
    print(f"{len(found)} compiled kernels in {arguments.out}")


if __name__ == "__main__":
    main()

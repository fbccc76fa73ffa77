"""Records content hashes in lra/data/checksums.json, with which `lra data verify` compares stores.

    python scripts/record_checksums.py DATA_ROOT text image scifar listops ...

Prepares each task under every protocol, keeps the records of other tasks, and prints a Markdown
table for docs/data.md. The data should be the publisher's own and complete.
"""

import json
import sys

from lra.config.build import build_task, data_arguments
from lra.config.compose import compose
from lra.data.inspect import CHECKSUMS
from lra.data.store import prepare, settings_name

PROTOCOLS = ("strict", "s4", "lra2020")


def main(data_root: str, tasks: list[str]) -> None:
    known = json.loads(CHECKSUMS.read_text("utf-8")) if CHECKSUMS.exists() else {}
    print(
        "| task | protocol | split | examples | mean length | smallest, largest class | SHA-256 |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in tasks:
        protocols: dict[str, list[str]] = {}  # by store
        manifests = {}
        for protocol in PROTOCOLS:
            cfg = compose([f"task={name}", f"protocol={protocol}", f"data.root={data_root}"])
            task = build_task(cfg)
            protocols.setdefault(settings_name(task), []).append(protocol)
            manifests[settings_name(task)] = prepare(task, **data_arguments(cfg)).manifest
        for store, manifest in manifests.items():
            known[store] = {split: entry["sha256"] for split, entry in manifest["splits"].items()}
            for split, entry in manifest["splits"].items():
                if "same_as" not in entry:
                    labels, mean = entry["labels"], entry["lengths"]["mean"]
                    low, high = (100 * x / sum(labels) for x in (min(labels), max(labels)))
                    print(
                        f"| {name} | {', '.join(protocols[store])} | {split} "
                        f"| {entry['count']:,} | {mean:,.1f} | {low:.1f} %, {high:.1f} % "
                        f"| `{entry['sha256'][:16]}` |"
                    )
    CHECKSUMS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

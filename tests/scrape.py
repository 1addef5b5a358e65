"""Samples of a server's `/metrics`."""

from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from whiflash_sglang.serve.metrics import PREFIX

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Value by name and sorted labels."""


def scraped(url: str) -> Samples:
    """Every sample of the server at `url`, as its answer to Prometheus has them."""
    text = httpx.get(url + "/metrics", timeout=None).raise_for_status().text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a series, of ours where its name has no prefix."""
    name = name if ":" in name else PREFIX + name
    wanted = labels.items()
    return sum(value for (found, own), value in samples.items() if found == name and wanted <= dict(own).items())


def values(samples: Samples, label: str) -> set[str]:
    """Values of a label in our series."""
    return {dict(labels)[label] for (name, labels) in samples if name.startswith(PREFIX) and label in dict(labels)}

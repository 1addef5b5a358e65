"""Writes series to prometheus_client, with the labels of SGLang's own metrics."""

from typing import Any

from whiflash_sglang.serve.metrics import SERIES, Labels, Series

METHODS = {"counter": "inc", "gauge": "set", "histogram": "observe"}


class Prometheus:
    """A sink that makes metrics of the same kinds and labels as SGLang's collector.

    With several processes prometheus_client writes to files that they share; the process that serves HTTP adds them up.
    """

    def __init__(self, collector: Any) -> None:
        # Imported here, after SGLang has set the environment that decides how prometheus_client stores values.
        import prometheus_client

        kinds = {
            "counter": collector._counter_cls or prometheus_client.Counter,
            "gauge": collector._gauge_cls or prometheus_client.Gauge,
            "histogram": collector._histogram_cls or prometheus_client.Histogram,
        }
        self._labels = dict(collector.labels)
        self._metrics = {series.name: self._metric(kinds[series.kind], series) for series in SERIES}
        self._children: dict[tuple[str, Labels], Any] = {}

    def _metric(self, kind: Any, series: Series) -> Any:
        options: dict[str, Any] = {"buckets": series.buckets} if series.buckets else {}
        if series.kind == "gauge":
            options["multiprocess_mode"] = "mostrecent"
        return kind(series.full_name, series.meaning, [*self._labels, *series.labels], **options)

    def write(self, series: Series, labels: Labels, number: float) -> None:
        child = self._children.get((series.name, labels))
        if child is None:
            own = dict(zip(series.labels, labels, strict=True))
            child = self._children[series.name, labels] = self._metrics[series.name].labels(**self._labels, **own)
        getattr(child, METHODS[series.kind])(number)

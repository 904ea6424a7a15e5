"""An endpoint for Prometheus: the numbers of a run, over HTTP, while its server lives."""

import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from pilot.errors import PilotError

logger = logging.getLogger("pilot")

_MOST_CLIENTS = 1000
_MOST_NUMBERS = 200


class Prometheus:
    """Follows events and metrics. Raises PilotError where prometheus-client is not installed.

    A port that cannot be had costs one warning: the run continues without.
    """

    def __init__(self, run_name: str, host: str, port: int) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise PilotError(
                "prometheus-port needs prometheus-client, which is not installed here: "
                "uv sync --extra prometheus, or pip install 'pilot[prometheus]'"
            ) from None
        self._run, self._client = run_name, client
        self._registry = client.CollectorRegistry()
        self._lock = threading.Lock()
        self._gauges: dict[str, Any] = {}
        self._clients: set[str] = set()
        self._events = client.Counter(
            "pilot_events", "events of the run, by kind", ["run", "event"], registry=self._registry
        )
        self._server: Any = None
        try:
            self._server, self._thread = client.start_http_server(
                port, addr=host, registry=self._registry
            )
        except (OSError, OverflowError) as error:
            logger.warning("prometheus: cannot listen on %s:%d: %s", host, port, error)

    @property
    def port(self) -> int:
        """Where it listens; 0: nowhere."""
        return self._server.server_port if self._server else 0

    def event(self, record: Mapping[str, Any]) -> None:
        kind, client = str(record["event"]), record.get("client")
        self._events.labels(self._run, kind).inc()
        self._set("last_event_time_seconds", record["time"], "when the last event was")
        if kind in ("client_silent", "client_back", "reply") and client:
            self._set_of_client("client_silent", str(client), float(kind == "client_silent"))
        if kind == "round_opened":
            self._set("round", record["round"], "the round that is open")
            self._set("round_clients", len(record["clients"]), "clients with an order")
        for name, speed in (record.get("speeds") or {}).items():
            self._set_of_client("client_tokens_per_second", name, speed["tokens_per_s"])

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Finite numbers of one round."""
        for name, value in values.items():
            self._set(f"last_{name}", value, "of the last round that had it")

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _gauge(self, name: str, text: str, labels: list[str]) -> Any:
        name = "pilot_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        with self._lock:
            if name not in self._gauges and len(self._gauges) < _MOST_NUMBERS:
                gauge = self._client.Gauge(name, text, labels, registry=self._registry)
                self._gauges[name] = gauge
            return self._gauges.get(name)

    def _set(self, name: str, value: Any, text: str) -> None:
        if isinstance(value, int | float) and (gauge := self._gauge(name, text, ["run"])):
            gauge.labels(self._run).set(value)

    def _set_of_client(self, name: str, client: str, value: Any) -> None:
        if client not in self._clients and len(self._clients) >= _MOST_CLIENTS:
            return
        self._clients.add(client)
        gauge = self._gauge(name, "of a client", ["run", "client"])
        if isinstance(value, int | float) and gauge:
            gauge.labels(self._run, client).set(value)

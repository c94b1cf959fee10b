#!/usr/bin/env python3
"""A batch job that pushes its metrics by prometheus_client. It counts the lines of
a file:

    apt-get install python3-prometheus-client
    ./job.py /etc/hosts
    ./job.py --delete /etc/hosts

CULVERT_URL names the proxy, http://localhost:8080 by default.
"""

import argparse
import os
import time

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import delete_from_gateway, push_to_gateway, pushadd_to_gateway
from prometheus_client.exposition import default_handler

URL = os.environ.get("CULVERT_URL") or "http://localhost:8080"
JOB = "example_python"


def handler(url, method, timeout, headers, data):
    """Sends a push. It is here for a header of Culvert's own: push_up becomes 0
    where no push comes for 24 h and a grace of 10 %."""
    return default_handler(url, method, timeout, headers + [("Culvert-Interval", "24h")], data)


def main():
    parser = argparse.ArgumentParser(description="Counts the lines of a file.")
    parser.add_argument("--delete", action="store_true", help="delete the file's metrics: it is not counted any more")
    parser.add_argument("file")
    args = parser.parse_args()

    # One group for each file. The client takes care of the slashes.
    group = {"file": os.path.abspath(args.file)}
    if args.delete:
        delete_from_gateway(URL, job=JOB, grouping_key=group)
        return

    # A registry of its own: the default one has metrics of the process too.
    registry = CollectorRegistry()
    duration = Gauge("linecount_duration_seconds", "How long the last count took.", registry=registry)
    success = Gauge("linecount_success", "1 if the last count succeeded, else 0.", registry=registry)
    start = time.time()
    try:
        with open(args.file, "rb") as f:
            count = sum(1 for _ in f)
    except OSError:
        duration.set(time.time() - start)
        success.set(0)
        # This replaces only the metrics that it brings, so the last success stays.
        pushadd_to_gateway(URL, job=JOB, registry=registry, grouping_key=group, timeout=10, handler=handler)
        raise
    duration.set(time.time() - start)
    success.set(1)
    Gauge("linecount_last_success_time_seconds", "When a count succeeded last.", registry=registry).set_to_current_time()
    Gauge("linecount_lines", "Lines of the file.", registry=registry).set(count)
    # This replaces all metrics of the group.
    push_to_gateway(URL, job=JOB, registry=registry, grouping_key=group, timeout=10, handler=handler)


if __name__ == "__main__":
    main()

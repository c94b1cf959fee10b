"""Calls all of prometheus_client's push functions that a grouping key can go
through. push_test.go knows what must be in a scrape afterwards."""

import os
import sys

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client import delete_from_gateway, push_to_gateway, pushadd_to_gateway
from prometheus_client import instance_ip_grouping_key
from prometheus_client.exposition import basic_auth_handler, default_handler

URL = os.environ["CULVERT_URL"]
ADDRESS = URL.removeprefix("http://")


def with_password(url, method, timeout, headers, data):
    return basic_auth_handler(url, method, timeout, headers, data, "somebody", "secret")


# Each is (gateway, job, grouping key, handler).
GROUPS = [
    (URL, "py_plain", None, default_handler),
    (ADDRESS, "py_address", None, default_handler),
    (URL + "/", "py_slash_behind", None, default_handler),
    (URL, "py_instance", {"instance": "web-1"}, default_handler),
    (URL, "py_ip", instance_ip_grouping_key(), default_handler),
    (URL, "py/slash", {"path": "/srv/data", "b": "x"}, default_handler),
    (URL, "py_base64", {"path": "/\u00ff\u00fe?>"}, default_handler),
    (URL, "py_empty", {"empty": ""}, default_handler),
    (URL, "py_\u00fcnic\u00f6de", {"city": "Z\u00fcrich \u2603"}, default_handler),
    (URL, "py_reserved", {"v": "50% & a+b=c?#@"}, default_handler),
    (URL, "py_number", {"shard": 7}, default_handler),
    (URL, "py_password", None, with_password),
]


def one(name, value):
    registry = CollectorRegistry()
    Gauge(name, "Of a test.", registry=registry).set(value)
    return registry


def all_types():
    registry = CollectorRegistry()
    Counter("py_things", "Of a test.", ["kind"], registry=registry).labels("a \"b\"\\\n").inc(3)
    Summary("py_took_seconds", "Of a test.", registry=registry).observe(1.5)
    Histogram("py_sizes", "Of a test.", buckets=(1, 2.5, 10), registry=registry).observe(2)
    Info("py_build", "Of a test.", registry=registry).info({"version": "1"})
    Enum("py_state", "Of a test.", states=["on", "off"], registry=registry).state("off")
    return registry


if sys.argv[1] == "push":
    for gateway, job, group, handler in GROUPS:
        push_to_gateway(gateway, job, one("py_old", 1), group, handler=handler)
        push_to_gateway(gateway, job, one("py_pushed", 2), group, timeout=None, handler=handler)
        pushadd_to_gateway(gateway, job, one("py_added", 3), group, timeout=10, handler=handler)
    push_to_gateway(URL, "py_types", all_types())
    push_to_gateway(URL, "py_nothing", CollectorRegistry())
    pushadd_to_gateway(URL, "py_default", None)  # the default registry
elif sys.argv[1] == "delete":
    for gateway, job, group, handler in GROUPS:
        delete_from_gateway(gateway, job, group, handler=handler)
    delete_from_gateway(URL, "py_types")
    delete_from_gateway(URL, "py_nothing")
    delete_from_gateway(URL, "py_default")
    delete_from_gateway(URL, "py_never_pushed")

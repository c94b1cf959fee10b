#!/bin/sh
# Pushes of every kind by curl, each with what Prometheus gets to see of it:
#
#     ./curl.sh
#     CULVERT_URL=http://culvert.example.net:8080 ./curl.sh
#
# The jobs are all named example_…, and deleted at the end.
set -eu
url=${CULVERT_URL:-http://localhost:8080}

# --fail-with-body (curl 7.76) makes a refused push an error, and shows the reason.
curl() { command curl --silent --show-error --fail-with-body "$@"; }

step() { printf '\n== %s\n' "$*"; }
scrape() { curl "$url/metrics?only=groups" | grep -F "job=\"$1\"" || true; }

step "PUT replaces the group that the path names"
# --data-binary, because --data drops the line ends.
curl -X PUT --data-binary @- "$url/metrics/job/example_report" <<END
# HELP report_rows Rows of the last report.
# TYPE report_rows gauge
report_rows 4711
# TYPE report_duration_seconds gauge
report_duration_seconds 12.5
END
scrape example_report

step "POST replaces only the metrics that it names; report_duration_seconds stays"
echo 'report_rows 4712' | curl --data-binary @- "$url/metrics/job/example_report"
scrape example_report

step "interval: push_up becomes 0 when the next push is overdue; ttl: the samples go after that time"
echo 'sync_files 17' | curl --data-binary @- "$url/metrics/job/example_sync/instance/web-1?interval=10m&ttl=1h"
scrape example_sync

step "base64 for a value with a slash, as in {path=\"/srv/data\"}"
path=$(printf %s /srv/data | base64 | tr '+/' '-_')
echo 'disk_files 12' | curl --data-binary @- "$url/metrics/job/example_disk/path@base64/$path"
scrape example_disk

step "aggregate=sum adds what each short-lived process has counted itself; gauge=max keeps the largest"
for requests in 3 4; do
  curl --data-binary @- "$url/metrics/job/example_worker?aggregate=sum&gauge=max" <<END
# TYPE worker_requests_total counter
worker_requests_total $requests
# TYPE worker_longest_seconds gauge
worker_longest_seconds 0.$requests
END
done
scrape example_worker

step "a batch: the series' own labels say which groups they belong to"
curl --data-binary @- "$url/api/v1/push?group_by=job,instance" <<END
# TYPE nightly_success gauge
nightly_success{job="example_nightly",instance="db-1"} 1
nightly_success{job="example_nightly",instance="db-2"} 0
END
echo
scrape example_nightly

step "DELETE removes the group of exactly that path"
curl -X DELETE "$url/metrics/job/example_nightly/instance/db-1"
scrape example_nightly

step "deletion by matcher, of the grouping labels; dry_run tells first which groups would go"
curl -X DELETE --get --data-urlencode 'match[]={job=~"example_.+"}' --data dry_run=true "$url/api/v1/groups"
echo
curl -X DELETE --get --data-urlencode 'match[]={job=~"example_.+"}' "$url/api/v1/groups"
echo

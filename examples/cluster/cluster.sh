#!/usr/bin/env bash
# Three proxies that share an etcd of three members, two agents, and two Prometheis, all on
# this machine. Needs Go, etcd and prometheus (Debian: etcd-server, prometheus). It stays up
# until Ctrl-C; with --once it ends when both Prometheis have seen everything.
set -euo pipefail
cd "$(dirname "$0")/../.."

for program in go etcd prometheus curl; do
  command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 1; }
done
port=${PORT:-18000} # the first of about 400
work=$(mktemp -d)
pids=()
stop() {
  trap - EXIT
  # Those that came last go first: nobody should miss what is going.
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    kill "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# run NAME COMMAND… starts a program with its log in a file.
run() {
  local name=$1
  shift
  "$@" >"$work/$name.log" 2>&1 &
  pids+=($!)
}
# await WHAT COMMAND… waits until the command succeeds.
await() {
  local what=$1
  shift
  for ((i = 0; i < 300; i++)); do
    if "$@" >/dev/null 2>&1; then
      return
    fi
    sleep 0.2
  done
  echo "$what: not after a minute; the logs end with:" >&2
  tail -n 5 "$work"/*.log >&2
  exit 1
}
# up PROMETHEUS N: as many targets as N are up there.
up() {
  curl -fs "http://127.0.0.1:$1/api/v1/query?query=sum(up)" | grep -q "\"$2\"\\]"
}

echo "Building culvert-proxy and culvert-client…"
go build -o "$work/" ./proxy ./client

members=""
for n in 1 2 3; do
  members+="${members:+,}etcd-$n=http://127.0.0.1:$((port + 100 + n))"
done
endpoints=""
for n in 1 2 3; do
  client=http://127.0.0.1:$((port + n)) peer=http://127.0.0.1:$((port + 100 + n))
  endpoints+="${endpoints:+,}$client"
  run "etcd-$n" etcd --name="etcd-$n" --data-dir="$work/etcd-$n" \
    --listen-client-urls="$client" --advertise-client-urls="$client" \
    --listen-peer-urls="$peer" --initial-advertise-peer-urls="$peer" --initial-cluster="$members"
done

proxies=()
for n in 1 2 3; do
  proxies+=("http://127.0.0.1:$((port + 200 + n))")
  run "proxy-$n" "$work/proxy" --web.listen-address="127.0.0.1:$((port + 200 + n))" --storage.path= \
    --cluster.etcd-endpoints="$endpoints" --cluster.listen-address="127.0.0.1:$((port + 300 + n))"
done
for proxy in "${proxies[@]}"; do
  await "the proxy $proxy is ready to take pushes" curl -fs "$proxy/-/ready?for=push"
done

# One agent has a tunnel to each proxy, the other to the last one alone.
run web-1 "$work/client" --fqdn=web-1 --metrics-addr= "${proxies[@]/#/--proxy-url=}"
run web-2 "$work/client" --fqdn=web-2 --metrics-addr= --proxy-url="${proxies[2]}"
await "web-2 can be scraped through the first proxy" curl -fsx "${proxies[0]}" http://agent.web-2/metrics

# A job pushes to one proxy; all have the group.
echo "backup_last_success_timestamp_seconds $(date +%s)" | curl -fsS --data-binary @- "${proxies[1]}/metrics/job/backup"
await "the push is on the last proxy too" sh -c "curl -fs '${proxies[2]}/metrics?only=groups' | grep -q backup_last_success"

# Each Prometheus has a proxy of its own.
for n in 1 2; do
  proxy=${proxies[n - 1]}
  cat >"$work/prometheus-$n.yml" <<EOF
global: {scrape_interval: 1s, scrape_timeout: 1s}
scrape_configs:
  - job_name: agents
    proxy_url: $proxy
    static_configs: [{targets: [agent.web-1, agent.web-2]}]
  - job_name: pushed
    honor_labels: true
    params: {only: [groups]}
    static_configs: [{targets: ['${proxy#http://}']}]
EOF
  run "prometheus-$n" prometheus --config.file="$work/prometheus-$n.yml" --storage.tsdb.path="$work/prometheus-$n" \
    --web.listen-address="127.0.0.1:$((port + 400 + n))"
done
for n in 1 2; do
  await "Prometheus $n has three targets up" up $((port + 400 + n)) 3
done

cat <<EOF
Proxies:     ${proxies[*]}
etcd:        $endpoints
Prometheis:  http://127.0.0.1:$((port + 401)) http://127.0.0.1:$((port + 402)): all of their targets are up
Logs:        $work
web-1 has a tunnel to each proxy, web-2 to the last one alone; both can be scraped through each:
  curl -x ${proxies[0]} http://agent.web-2/metrics
A push to one is on all:
  echo 'hello 1' | curl --data-binary @- ${proxies[0]}/metrics/job/hello; curl ${proxies[2]}/metrics?only=groups
EOF
if [ "${1-}" = --once ]; then
  exit 0
fi
echo "Ctrl-C ends it all."
wait

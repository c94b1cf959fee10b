#!/bin/sh
# Backs up a directory, and tells Prometheus how it went. In /etc/cron.d/backup:
#
#     CULVERT_URL=http://culvert.example.net:8080
#     30 2 * * * root /usr/local/bin/backup.sh /srv/data /var/backups/data.tar
#
# alerts.yml has the alerts that go with it.
set -eu
usage='usage: backup.sh DIRECTORY ARCHIVE'
directory=${1:?$usage}
archive=${2:?$usage}
group=${CULVERT_URL:-http://localhost:8080}/metrics/job/backup/instance/$(uname -n)

# push adds metrics to the group. It never fails: a backup without a report is
# better than none. cron mails what it prints.
push() {
  curl --silent --show-error --fail-with-body --max-time 10 --retry 3 --data-binary @- "$group?interval=24h" >&2 ||
    echo "backup.sh: could not push to $group" >&2
}

# report runs at the end, however it comes. A POST leaves alone what it doesn't
# name, so a failed backup keeps the time of the last success.
report() {
  status=$?
  rm -f "$archive.part"
  end=$(date +%s)
  {
    cat <<END
# HELP backup_duration_seconds How long the last backup took.
# TYPE backup_duration_seconds gauge
backup_duration_seconds $((end - start))
# HELP backup_success 1 if the last backup succeeded, else 0.
# TYPE backup_success gauge
backup_success $((status == 0))
END
    [ "$status" -ne 0 ] || cat <<END
# HELP backup_last_success_time_seconds When a backup succeeded last.
# TYPE backup_last_success_time_seconds gauge
backup_last_success_time_seconds $end
# HELP backup_size_bytes Size of the last good archive.
# TYPE backup_size_bytes gauge
backup_size_bytes $(wc -c <"$archive")
END
  } | push
  exit "$status"
}

start=$(date +%s)
trap report EXIT
# Without these the shell would end by the signal, and not report.
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

push <<END
# HELP backup_start_time_seconds When the last backup started.
# TYPE backup_start_time_seconds gauge
backup_start_time_seconds $start
END

tar -cf "$archive.part" -C "$directory" .
mv "$archive.part" "$archive"

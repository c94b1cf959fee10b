#!/bin/sh
# Backs up a directory. culvert-client run pushes when, how long and how well; this
# adds how large the archive is.
set -eu
usage='usage: backup.sh DIRECTORY ARCHIVE'
directory=${1:?$usage}
archive=${2:?$usage}

trap 'rm -f "$archive.part"' EXIT
tar -cf "$archive.part" -C "$directory" .
mv "$archive.part" "$archive"

# Started by hand there is no such file, and nobody to push it.
cat >"${CULVERT_METRICS_FILE:-/dev/null}" <<END
# HELP backup_size_bytes Size of the last good archive.
# TYPE backup_size_bytes gauge
backup_size_bytes $(wc -c <"$archive")
END

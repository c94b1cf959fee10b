#!/bin/sh
# Builds packages of both programs for Debian and Red Hat, and their kin:
#
#   examples/packages/build.sh DIRECTORY [GOARCH…]
#
# DIRECTORY gets the packages; GOARCH is this machine's where none is given, as in amd64 or
# arm64. VERSION is the version, that of the last tag by default. The same commit gives the
# same packages, byte for byte.
set -eu

if [ $# -lt 1 ]; then
	echo "usage: $0 DIRECTORY [GOARCH…]" >&2
	exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
host=$(go env GOHOSTARCH)
[ $# -gt 0 ] || set -- "$host"

# Without git, or without a commit, there is neither a revision nor its date.
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || date +%s)}"
if [ -z "${VERSION:-}" ]; then
	# ~ sorts before everything, so that the first release is newer.
	VERSION=$(git describe --tags --match 'v[0-9]*' 2>/dev/null || echo "v0.0.0~git$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S)")
	VERSION=$(echo "${VERSION#v}" | tr - +)
fi
maintainer=${MAINTAINER:-The Culvert authors <culvert@example.net>}
export SOURCE_DATE_EPOCH CGO_ENABLED=0 GOFLAGS=

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # PROGRAM GOARCH
	prefix=github.com/prometheus/common/version
	GOOS=linux GOARCH=$2 go build -trimpath -buildvcs=false -o "$work/$2/culvert-$1" \
		-ldflags "-s -w -X $prefix.Version=$VERSION -X $prefix.Revision=$revision -X $prefix.BuildDate=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d-%H:%M:%S)" "./$1"
}

# nfpm is no part of the programs: it has a go.mod of its own.
go -C "$here/nfpm" build -o "$work/nfpm" github.com/goreleaser/nfpm/v2/cmd/nfpm

for kind in proxy client; do
	name=culvert-$kind
	case $kind in
	proxy) summary="Prometheus scrapes to agents behind firewalls, and a push store for batch jobs" ;;
	client) summary="agent that lets Prometheus scrape its host through culvert-proxy" ;;
	esac
	root=$work/$kind
	mkdir -p "$root"

	build $kind "$host"
	"$work/$host/$name" --help-man | gzip -9n >"$root/$name.1.gz"
	"$work/$host/$name" --completion-script-bash >"$root/$name.bash"
	"$work/$host/$name" --completion-script-zsh >"$root/_$name"
	gzip -9nc README.md >"$root/README.md.gz"
	gzip -9nc CHANGELOG.md >"$root/CHANGELOG.md.gz"
	# What is linked in has licenses that want to be passed on, and so has Go's library.
	{
		echo "Go $(go env GOVERSION) $(go env GOROOT)"
		go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' "./$kind" | sort -u
	} |
		while read -r module version dir; do
			for file in "$dir"/LICENSE* "$dir"/NOTICE* "$dir"/COPYING*; do
				[ ! -f "$file" ] || printf '\n==== %s %s: %s\n\n' "$module" "$version" "$(basename "$file")" | cat - "$file"
			done
		done | gzip -9n >"$root/LICENSES.gz"
	for script in postinstall preremove postremove; do
		sed "s/@NAME@/$name/g" "$here/$script.sh" >"$root/$script.sh"
	done

	for arch; do
		[ -e "$work/$arch/$name" ] || build $kind "$arch"
		sed -e "s|@NAME@|$name|g; s|@KIND@|$kind|g; s|@ARCH@|$arch|g; s|@SUMMARY@|$summary|g" \
			-e "s|@VERSION@|$VERSION|g; s|@MAINTAINER@|$maintainer|g; s|@WORK@|$work|g" "$here/nfpm.yaml" >"$root/nfpm.yaml"
		for packager in deb rpm; do
			"$work/nfpm" package --config "$root/nfpm.yaml" --packager $packager --target "$out/"
		done
	done
done

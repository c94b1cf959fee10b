# syntax=docker/dockerfile:1
# The agent as an image, from the top of the repository:
#
#   docker build -f examples/docker/client.Dockerfile -t culvert-client .
#   docker run --network=host culvert-client --proxy-url=http://proxy.example.net:8080 --fqdn=web-1.example.net --allow=9100
#
# With the network of the host, its exporters on localhost are in reach. --storage.path=/data
# and a volume there keep what jobs pushed, --key-file=/data/agent.key the agent's key.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X github.com/prometheus/common/version.Version=$VERSION" -o /out/culvert-client ./client
RUN mkdir -p /out/data /out/tmp

FROM scratch
# For https to the proxies and to exporters.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chmod=1777 /out/tmp /tmp
COPY --from=build --chown=65532:65532 --chmod=0700 /out/data /data
COPY --from=build /out/culvert-client /culvert-client
COPY LICENSE /LICENSE
USER 65532:65532
EXPOSE 9369
ENTRYPOINT ["/culvert-client"]

# syntax=docker/dockerfile:1
# The proxy as an image, from the top of the repository:
#
#   docker build -f examples/docker/proxy.Dockerfile -t culvert-proxy .
#   docker run -p 8080:8080 -v culvert:/data culvert-proxy
#
# There is no HEALTHCHECK, as there is nothing in the image to make a request with: ask
# /-/healthy and /-/ready from outside.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X github.com/prometheus/common/version.Version=$VERSION" -o /out/culvert-proxy ./proxy
RUN mkdir -p /out/data /out/tmp

FROM scratch
# For etcd and other proxies by https.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chmod=1777 /out/tmp /tmp
# --storage.path is data/ by default, and is here then.
COPY --from=build --chown=65532:65532 --chmod=0700 /out/data /data
COPY --from=build /out/culvert-proxy /culvert-proxy
COPY LICENSE /LICENSE
USER 65532:65532
VOLUME /data
EXPOSE 8080
ENTRYPOINT ["/culvert-proxy"]

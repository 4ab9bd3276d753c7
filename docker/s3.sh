#!/bin/sh
# An S3 server (SeaweedFS) on port 8333 of ADDRESS, with one bucket; its data in DATA.
set -eu
: "${ADDRESS:=0.0.0.0}" "${DATA:=/data}" "${PORT:=8333}" "${BUCKET:=ckpt}"
cat >"$DATA/s3.json" <<JSON
{"identities": [{"name": "trainer", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
JSON
exec weed mini -dir="$DATA" -ip=127.0.0.1 -ip.bind="$ADDRESS" -s3.port="$PORT" -s3.config="$DATA/s3.json" -bucket="$BUCKET" \
    -master.telemetry=false -webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0 ${MORE:-}

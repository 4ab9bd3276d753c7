#!/bin/sh
# One of NODES nodes that train the demo's model into ROOT, NODE counted from 0; the first one waits at RENDEZVOUS.
set -eu
: "${NODES:=2}" "${RANKS_A_NODE:=2}" "${TP:=2}" "${STEPS:=24}" "${SAVE_EVERY:=4}"
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$RANKS_A_NODE" \
    --rdzv-backend c10d --rdzv-id demo --rdzv-endpoint "$RENDEZVOUS" ${ADDRESS:+--local-addr "$ADDRESS"} \
    -m benchmarks.demo_train "$ROOT" --steps "$STEPS" --save-every "$SAVE_EVERY" --tp "$TP"

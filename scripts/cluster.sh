#!/usr/bin/env bash
# Several hosts on one machine: each is a network, UTS and IPC namespace with its own name and loopback, joined by veth
# pairs through a bridge, every link limited by a token bucket. Runs a job across them and cleans up, always.
#
#   scripts/cluster.sh [options] [--] COMMAND...     COMMAND is what every rank runs, e.g. build/release/sluice train ...
#     --nodes N            hosts (2)
#     --ranks-per-node R   ranks of each (2)
#     --rate RATE          of each host's link, each way, as tc writes it: 1gbit (default), 100mbit, 0 for none
#     --delay TIME         added to each link each way, e.g. 100us (none)
#     --launcher KIND      sluice (default): one `sluice launch` a host; mpi: mpirun, TCP only
#     --sluice FILE        the program (build/release/sluice)
#     --count-bytes        the command is a `sluice bench --json`: runs it with 2 and with 6 iterations and compares what the
#                          links' counters saw more with what the plans of 4 iterations say crosses nodes; fails when they
#                          differ by more than 10%
#     --check              says whether this machine allows it, and why not: exit code 0 or 77
# Standard output is that of the command. Needs root (or a user namespace that may), iproute2.
set -euo pipefail

nodes=2 ranks_per_node=2 rate=1gbit delay= launcher=sluice count_bytes=0 check=0
sluice="$(dirname "$0")/../build/release/sluice"
usage() { sed -n '2,18p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes) nodes="$2"; shift 2 ;;
    --ranks-per-node) ranks_per_node="$2"; shift 2 ;;
    --rate) rate="$2"; shift 2 ;;
    --delay) delay="$2"; shift 2 ;;
    --launcher) launcher="$2"; shift 2 ;;
    --sluice) sluice="$2"; shift 2 ;;
    --count-bytes) count_bytes=1; shift ;;
    --check) check=1; shift ;;
    --help) usage ;;
    --) shift; break ;;
    -*) echo "cluster.sh: unknown option $1" >&2; usage ;;
    *) break ;;
  esac
done

skip() { echo "skipped: $1" >&2; exit 77; }
for tool in ip tc unshare nsenter; do
  command -v "$tool" >/dev/null 2>&1 || skip "$tool is not installed (Debian: iproute2, util-linux)"
done
unshare --net --uts --ipc true 2>/dev/null || skip "this machine does not allow network namespaces (root is needed)"
[ "$check" = 1 ] && exit 0
[ $# -gt 0 ] || usage
case "$launcher" in sluice | mpi) ;; *) echo "cluster.sh: --launcher is sluice or mpi" >&2; exit 2 ;; esac
sluice="$(readlink -f "$sluice")"

work="$(mktemp -d /tmp/sluice-cluster-XXXXXX)"
holders=()  # a sleeping process keeps each host's namespaces
jobs_pids=()
cleanup() {
  trap - EXIT INT TERM
  for pid in "${jobs_pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${jobs_pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  for pid in "${holders[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# The bridge has a namespace of its own, so nothing of this machine's network is touched. A namespace goes with the last
# process in it, and its links with it.
hold() {  # name -> pid in $held
  unshare --net --uts --ipc sh -c "hostname '$1' && exec sleep infinity" &
  held=$!
  holders+=("$held")
  for _ in $(seq 100); do
    [ "$(nsenter -t "$held" -u hostname 2>/dev/null)" = "$1" ] && return 0
    sleep 0.02
  done
  skip "cannot give a namespace its host name"
}
inside() { local pid="$1"; shift; nsenter -t "$pid" -n -u -i -- "$@"; }

hold switch
switch=$held
inside "$switch" ip link set lo up
inside "$switch" ip link add br0 type bridge 2>/dev/null || skip "this machine has no bridge device"
inside "$switch" ip link set br0 up
host=()
for n in $(seq 0 $((nodes - 1))); do
  hold "node$n"
  host+=("$held")
  inside "$switch" ip link add "port$n" type veth peer name eth0 netns "$held" || skip "this machine has no veth device"
  inside "$switch" ip link set "port$n" master br0
  inside "$switch" ip link set "port$n" up
  inside "$held" ip link set lo up
  inside "$held" ip addr add "10.77.0.$((n + 1))/24" dev eth0
  inside "$held" ip link set eth0 up
  # Out of the host at its own end, into it at the switch's; large sends are cut first, or the bucket counts them as one.
  for end in "$held eth0" "$switch port$n"; do
    read -r where device <<<"$end"
    parent=root
    if [ -n "$delay" ]; then
      inside "$where" tc qdisc add dev "$device" root handle 1: netem delay "$delay" limit 100000 2>/dev/null ||
        skip "this kernel has no netem, which --delay needs"
      parent="parent 1:"
    fi
    if [ "$rate" != 0 ]; then
      # shellcheck disable=SC2086
      inside "$where" tc qdisc add dev "$device" $parent tbf rate "$rate" burst 256kb latency 200ms 2>/dev/null ||
        skip "this kernel has no tbf"
    fi
  done
done

ranks=$((nodes * ranks_per_node))
# /sys shows the network namespace it was mounted in, so the counters come from ip.
counter() { inside "$1" ip -s -j link show dev eth0 | sed 's/.*"tx":{"bytes":\([0-9]*\).*/\1/'; }
count() {  # bytes that left the hosts so far -> $counted
  counted=0
  for pid in "${host[@]}"; do counted=$((counted + $(counter "$pid"))); done
}

# Runs the job; its output is in $work/stdout.
run_job() {
  code=0
  if [ "$launcher" = sluice ]; then
    openssl rand -hex 32 >"$work/secret" 2>/dev/null || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$work/secret"
    chmod 600 "$work/secret"
    for n in $(seq 0 $((nodes - 1))); do
      inside "${host[$n]}" "$sluice" launch -n "$ranks" --here "$((n * ranks_per_node))-$(((n + 1) * ranks_per_node - 1))" \
        --rendezvous 10.77.0.1:29400 --secret-file "$work/secret" -- "$@" >"$work/stdout.$n" &
      jobs_pids+=("$!")
    done
    for pid in "${jobs_pids[@]}"; do wait "$pid" || code=1; done
    jobs_pids=()
    cat "$work"/stdout.* >"$work/stdout"
  else
    # mpirun starts its daemons by what looks like ssh to it.
    cat >"$work/rsh" <<'RSH'
#!/usr/bin/env bash
# rsh HOST COMMAND...: the daemon of that host
folder="$(dirname "$0")"
pid="$(cat "$folder/pid.$1")"
shift
exec nsenter -t "$pid" -n -u -i -- sh -c "$*"
RSH
    chmod 700 "$work/rsh"
    : >"$work/hostfile"
    for n in $(seq 0 $((nodes - 1))); do
      echo "${host[$n]}" >"$work/pid.10.77.0.$((n + 1))"
      echo "10.77.0.$((n + 1)) slots=$ranks_per_node" >>"$work/hostfile"
    done
    as_root=()
    [ "$(id -u)" = 0 ] && as_root=(--allow-run-as-root)
    inside "${host[0]}" mpirun "${as_root[@]}" --hostfile "$work/hostfile" -n "$ranks" --map-by slot --bind-to none \
      --mca plm_rsh_agent "$work/rsh" --mca btl tcp,self --mca pml ob1 --mca btl_tcp_if_include eth0 \
      --mca oob_tcp_if_include eth0 "$@" >"$work/stdout" &
    jobs_pids+=("$!")
    wait "$!" || code=1
    jobs_pids=()
  fi
  return "$code"
}

code=0
if [ "$count_bytes" = 0 ]; then
  count
  before=$counted
  run_job "$@" || code=$?
  count
  cat "$work/stdout"
  echo "cluster: $nodes hosts of $ranks_per_node ranks, links $rate, $((counted - before)) bytes over the links" >&2
  exit "$code"
fi

seen=()
for iterations in 2 6; do
  count
  before=$counted
  run_job "$@" --set "bench.iterations=$iterations" --set bench.warmup=0 || exit 1
  count
  seen+=("$((counted - before))")
done
cat "$work/stdout"
# An iteration is a forward and a backward pass, of the schedule and of the sequential baseline.
python3 - "$work/stdout" "$((seen[1] - seen[0]))" <<'PY'
import json, sys
said = json.load(open(sys.argv[1]))["bytes"]["across_nodes"] * 2 * 2 * 4
seen = int(sys.argv[2])
off = seen / said - 1 if said else float("inf")
print(f"cluster: the plans say {said} bytes across nodes, the links carried {seen}: {100 * off:+.1f}%", file=sys.stderr)
sys.exit(0 if abs(off) <= 0.10 else 1)
PY

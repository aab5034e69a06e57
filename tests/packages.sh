#!/usr/bin/env bash
# The Debian packages that the tests start: a SLURM, hosts with sshd and pdsh; libaio is DeepSpeed's.
# Where they cannot be had this says why and ends well: the tests that need them say it again and are skipped, or fail
# where CI is set.
set -euo pipefail

declare -A package_of=(
    [slurmctld]=slurm-wlm [munged]=munge [pdsh]=pdsh [sshd]=openssh-server [ssh]=openssh-client [ip]=iproute2
    [unshare]=util-linux [numactl]=numactl
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!package_of[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[[ -e /usr/include/libaio.h ]] || missing+=(libaio-dev)
((${#missing[@]})) || exit 0

reason=
[[ $(id -u) == 0 ]] || reason="that needs root"
command -v apt-get >/dev/null || reason="there is no apt-get here"
if [[ -n $reason ]]; then
    echo "tests: not installed: ${missing[*]} ($reason)" >&2
    exit 0
fi
echo "tests: installing ${missing[*]}"
# The packages of daemons start them; the tests start their own, and this machine shall have no sshd that nobody asked for.
rule=/usr/sbin/policy-rc.d
if [[ ! -e $rule ]]; then
    trap 'rm -f "$rule"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$rule"
    chmod +x "$rule"
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
(apt-get update -q && apt-get install -y -q "${missing[@]}") >"$log" 2>&1 ||
    echo "tests: apt-get could not install ${missing[*]}: $(grep -m1 '^E:' "$log" || tail -n1 "$log")" >&2
rm -f "$log"

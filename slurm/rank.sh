#!/usr/bin/env bash
# One rank of a step: runs the command, and says by its exit code whose fault the end was.
#
# srun keeps the highest code of all ranks, and sends SIGTERM to the others when one ends with any code but 0. A rank that
# was sent SIGTERM may then say 85, saved and left, or 143, although another one failed. So a rank's own failure is
# raised above both (attempt.sh takes the 100 off again), and what came after a SIGTERM is not held against it.
set -uo pipefail

sent_away=
trap 'sent_away=yes' TERM
trap : USR2 # for the command, which hears it too
"$@"
code=$?
if [[ $code == 143 || ($code != 0 && -n $sent_away) ]]; then # the command may have died of it before this script heard it
    exit 85
elif ((0 < code && code < 28)); then
    exit $((100 + code))
fi
exit $code

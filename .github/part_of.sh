# The parts whose tests a change needs, for `make test PART=…`: nothing if it needs all. Arguments: two revisions.
# A part is tested alone if nothing below it changed. Nothing but lab/ is above train/; all tests run on cpu/.
set -eu
folders=$(git diff --name-only "$1" "$2" | cut -d/ -f1 | sort -u)
case $(echo $folders) in
lab) echo lab ;;
train | "lab train") echo lab train ;;
esac

#!/usr/bin/env bash
# Build the image, tag it with version and commit, and push it to Artifact Registry and, if requested, to Docker Hub.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat << 'END'
usage: ./build_and_push.sh [--flag value ...]

  --project PROJECT     Google Cloud project; default: GOOGLE_CLOUD_PROJECT, else that of gcloud
  --region REGION       region of Artifact Registry; default: GOOGLE_CLOUD_REGION, else gcloud's compute/region
  --repository NAME     repository in Artifact Registry; default: DYLO_MOE_REPOSITORY, else dylora-moe
  --dockerhub USER      also push to Docker Hub as this user; default: DOCKERHUB_USER, else no push there
  --target cuda|cpu     variant of torch; default: DYLO_MOE_TARGET, else cuda
  --pip-conf FILE       pip's configuration for the build, such as a private index; default: DYLO_MOE_PIP_CONF, else none
  --no-push             only build dylora-moe:...; needs no project and no region
  --dry-run             print the commands and run none
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

project=${GOOGLE_CLOUD_PROJECT:-}
region=${GOOGLE_CLOUD_REGION:-}
repository=${DYLO_MOE_REPOSITORY:-dylora-moe}
dockerhub=${DOCKERHUB_USER:-}
target=${DYLO_MOE_TARGET:-cuda}
pip_conf=${DYLO_MOE_PIP_CONF:-}
push=yes
dry=no
while [ $# -gt 0 ]; do
  case $1 in
    --project | --region | --repository | --dockerhub | --target | --pip-conf | --pip_conf)
      case ${2:---} in --*) fail "$1 needs a value" ;; esac
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      shift
      ;;
    --no-push | --no_push) push=no ;;
    --dry-run | --dry_run) dry=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown argument '$1'; see $0 --help" ;;
  esac
  shift
done

from_gcloud() {
  command -v gcloud > /dev/null || return 0
  gcloud config get-value "$1" --quiet 2> /dev/null < /dev/null | grep -v '^(unset)$' || true
}

run() {
  if [ "$dry" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

[ "$target" = cuda ] || [ "$target" = cpu ] || fail "--target must be cuda or cpu, got '$target'"
[ -z "$pip_conf" ] || [ -f "$pip_conf" ] || fail "--pip-conf: there is no file '$pip_conf'"
if [ "$push" = yes ]; then
  [ -n "$project" ] || project=$(from_gcloud core/project)
  [ -n "$region" ] || region=$(from_gcloud compute/region)
  [ -n "$project" ] || fail "--project is missing: give it, set GOOGLE_CLOUD_PROJECT, or run gcloud config set project PROJECT"
  [ -n "$region" ] || fail "--region is missing: give it, set GOOGLE_CLOUD_REGION, or run gcloud config set compute/region REGION"
fi
git rev-parse --quiet --verify HEAD > /dev/null 2>&1 || fail "this folder is no git clone; the tag of the image names its commit"
[ -z "$(git status --porcelain)" ] || fail "the working tree has uncommitted changes; commit or stash them first"

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
commit=$(git rev-parse --short=12 HEAD)
host=$region-docker.pkg.dev
names=("$host/$project/$repository/dylora-moe")
[ "$push" = yes ] || names=(dylora-moe)
[ -z "$dockerhub" ] || names+=("docker.io/$dockerhub/dylora-moe")
tags=()
for name in "${names[@]}"; do
  tags+=("$name:$version-$target" "$name:$version-$commit-$target")
done

build=(docker build --target "$target" --label "org.opencontainers.image.revision=$commit")
[ -z "$pip_conf" ] || build+=(--secret "id=pip,src=$pip_conf")
for tag in "${tags[@]}"; do
  build+=(--tag "$tag")
done
run env DOCKER_BUILDKIT=1 "${build[@]}" .
if [ "$push" = yes ]; then
  run gcloud auth configure-docker "$host" --quiet
  for tag in "${tags[@]}"; do
    run docker push "$tag"
  done
fi
echo "export DYLO_MOE_IMAGE=${tags[1]}"

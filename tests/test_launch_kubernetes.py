"""launch/kubernetes: the manifests as Kubernetes reads them, and the script with a fake kubectl."""

import re

import pytest
import yaml

import launch_fakes as fakes

SCRIPT = "kubernetes/launch.sh"
COMMON = ("--name=f16", "--image=example.org/vqgan:1", "--poll_seconds=1")
TPU = (
    *COMMON,
    "--kind=tpu",
    "--accelerator=tpu-v6e-slice",
    "--topology=4x4",
    "--hosts=4",
    "--per_host=4",
)
GPU = (*COMMON, "--kind=gpu", "--hosts=2", "--per_host=8")
ARGUMENTS = [
    "vqgan_jax.train",
    "--config=configs/quickstart.py",
    "--config.training.freeze=('encoder','quantizer')",
    "--b=$HOME $(A) $$(A) `date` \"x\" 'y' \\n & @NAME@ é",
    "--lines=\ta\nb",
]
POD = "f16-workers-0-0-POD"  # as a dry run calls it
DONE = {
    "jobset": ["", "f16:", "f16:Completed"],
    "pods": [f"{POD}:Running\n"],
    "logs": {POD: "line 1\nline 2\n"},
}


@pytest.fixture
def place(tmp_path):
    return fakes.Place(tmp_path / "place")


def launch(place, *options, plan=DONE):
    return place.launch(SCRIPT, *options, "--", *ARGUMENTS, plan=plan)


def manifest(place, *options):
    """The manifest that kubectl was given."""
    result = launch(place, *options)
    assert result.returncode == 0, result.stderr
    text = (place.directory / "manifest.yaml").read_text()
    return yaml.safe_load(text)


def expand(text, variables):
    """What Kubernetes makes of a word of a command or a value of a variable."""

    def replace(match):
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", replace, text)


def parts(jobset):
    """The JobSet's job, its pods' specification and the only container of these."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["name"] == "workers" and replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


@pytest.mark.parametrize(("options", "hosts"), [(TPU, 4), (GPU, 2)])
def test_what_both_manifests_have(place, options, hosts):
    jobset = manifest(place, *options, "--max_restarts=3")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "f16"
    job, pod, container = parts(jobset)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == hosts
    assert container["image"] == "example.org/vqgan:1"
    words = [expand(word, {"A": "wrong"}) for word in container["command"]]
    assert words == ["python", "-m", *ARGUMENTS]
    assert pod["serviceAccountName"] == "default"

    # 75 and disruptions restart all without counting; the rest counts.
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    disrupted, stopped = job["podFailurePolicy"]["rules"]
    assert disrupted == {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert stopped["action"] == "FailJob"
    assert stopped["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert pod["terminationGracePeriodSeconds"] == 120


def test_tpu_manifest(place):
    jobset = manifest(place, *TPU)
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    _, pod, container = parts(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    four = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": four, "limits": four}
    assert not container["env"] and not container["volumeMounts"] and not pod["volumes"]


def test_gpu_manifest(place):
    _, pod, container = parts(manifest(place, *GPU))
    eight = {"nvidia.com/gpu": 8}
    assert container["resources"] == {"requests": eight, "limits": eight}
    assert not pod["nodeSelector"]
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    assert container["env"] == [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": "f16-workers-0-0.f16:8476"},
        {"name": "JAX_NUM_PROCESSES", "value": "2"},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": index}},
    ]
    assert {"containerPort": 8476} in container["ports"]


@pytest.mark.parametrize("options", [TPU, (*GPU, "--accelerator=nvidia-h100-80gb")])
def test_options_of_the_manifest(place, options):
    value = "$(PATH) $x 'a' \"b\": {c} # \\ @IMAGE@"
    jobset = manifest(
        place,
        *options,
        "--spot",
        "--service_account=on",
        "--volume=runs:/runs",
        "--volume=data:/mnt/data",
        f"--env=VQGAN_JAX_DATA={value}",
        "--env=NO=",
    )
    _, pod, container = parts(jobset)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    if "--kind=gpu" in options:
        assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-h100-80gb"
    assert pod["serviceAccountName"] == "on"
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
    assert {claims[name]: path for name, path in mounts.items()} == {
        "runs": "/runs",
        "data": "/mnt/data",
    }
    variables = {v["name"]: v.get("value") for v in container["env"]}
    assert expand(variables["VQGAN_JAX_DATA"], {"PATH": "wrong"}) == value
    assert variables["NO"] == ""


def test_run_is_followed_through_restarts(place):
    plan = {
        "jobset": ["", "f16:", "f16:", "f16:", "f16:", "f16:Completed"],
        "pods": ["", "a:Pending\n", "a:Running\n", "a:Failed\nb:Running\n"],
        "logs": {"a": "first\n", "b": "second\n"},
    }
    result = launch(place, *TPU, plan=plan)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "first\nsecond\n"
    assert (place.directory / "runs/launch/f16.log").read_text() == "first\nsecond\n"


def test_failed_run(place):
    """The code and the last lines of the pod that failed first, leaving out those that stopped."""
    pods = [
        "2026-01-01T00:00:03Z 1 f16-workers-0-0-b",
        "2026-01-01T00:00:02Z 3 f16-workers-0-1-b",
        "2026-01-01T00:00:01Z 75 f16-workers-0-2-b",
        "  f16-workers-0-3-b",
    ]
    plan = {
        "jobset": ["", "f16:", "f16:Failed"],
        "pods": ["f16-workers-0-0-b:Running\n", "\n".join(pods)],
        "logs": {"f16-workers-0-0-b": "line\n", "f16-workers-0-1-b": "error: what went wrong\n"},
    }
    result = launch(place, *TPU, plan=plan)
    assert result.returncode == 3
    assert result.stdout == "line\nerror: what went wrong\n"
    assert "the JobSet f16 failed: exit code 3 of f16-workers-0-1-b." in result.stderr
    assert place.calls()[-1][:2] == ["kubectl", "logs"] and "--tail=20" in place.calls()[-1]


def test_failed_without_a_pod_that_failed(place):
    result = launch(place, *TPU, plan=DONE | {"jobset": ["", "f16:Failed"], "pods": [""]})
    assert result.returncode == 1
    assert "error: the JobSet f16 failed; kubectl describe jobset f16" in result.stderr


def test_earlier_run_of_that_name(place):
    result = launch(place, *TPU, plan=DONE | {"jobset": ["f16:Failed", "f16:", "f16:Completed"]})
    assert result.returncode == 0, result.stderr
    assert [call[1] for call in place.calls()][:3] == ["get", "delete", "apply"]


def test_run_that_is_under_way(place):
    result = launch(place, *TPU, plan=DONE | {"jobset": ["f16:", "f16:", "f16:Completed"]})
    assert result.returncode == 0, result.stderr
    assert "the JobSet f16 is under way." in result.stderr
    assert "line 2\n" in result.stdout
    assert "delete" not in [call[1] for call in place.calls()]


@pytest.mark.slow
def test_cluster_that_cannot_be_reached(place):
    result = launch(place, *TPU, plan=DONE | {"jobset": [1, "", "f16:", 1, 1, "f16:Completed"]})
    assert result.returncode == 0, result.stderr
    failing = fakes.Place(place.directory / "failing")
    result = launch(failing, *TPU, plan=DONE | {"jobset": [1]})
    assert result.returncode == 1
    assert len(failing.calls()) == 5
    assert [call[1] for call in failing.calls("sleep")] == ["1", "2", "4", "8"]
    assert result.stderr.splitlines()[-1].startswith("error: cannot ask for the JobSet f16")


def test_manifest_that_is_refused(place):
    result = launch(place, *TPU, plan=DONE | {"apply": [1]})
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot apply the JobSet f16")


@pytest.mark.parametrize("options", [TPU, GPU, (*GPU, "--namespace=mine")])
def test_dry_run_is_what_a_run_does(place, options):
    dry = launch(place, *options, "--dry_run")
    assert dry.returncode == 0 and dry.stderr == ""
    assert place.calls() == []
    launch(place, *options)
    commands = fakes.dry_commands(dry.stdout)
    assert [c for c in commands if c[0] == "kubectl"] == place.calls("kubectl")
    shown = dry.stdout.partition("<<'MANIFEST'\n")[2].partition("MANIFEST\n")[0]
    assert shown == (place.directory / "manifest.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*TPU, "--name=F16"), "--name=F16 is not a name of up to 40"),
        ((*TPU, f"--name={'a' * 41}"), "is not a name of up to 40"),
        ((*TPU, "--name=a: b"), "is not a name of up to 40"),
        ((*TPU, "--image=a b"), "--image=a\\ b is not an image"),
        ((*TPU, "--kind=cpu"), "--kind=cpu is not tpu or gpu"),
        ((*TPU, "--hosts=3"), "--topology=4x4 has 16 chips, and --hosts=3 with --per_host=4 have"),
        ((*TPU, "--topology=4"), "--topology=4 is not a topology"),
        ((*GPU, "--topology=4x4"), "--topology is of TPUs"),
        ((*GPU, "--volume=runs"), "--volume=runs is not CLAIM:PATH"),
        ((*GPU, "--env=A"), "--env=A is not NAME=VALUE"),
        ((*GPU, "--namespace=A_b"), "is not a namespace"),
        ((*GPU, "--env=A=\x1b"), "has characters of control"),
    ],
)
def test_bad_options(place, options, words):
    result = launch(place, *options)
    assert result.returncode == 1
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert place.calls() == []


def test_dockerfile_copies_what_the_package_needs():
    text = (fakes.ROOT / "launch/kubernetes/Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for w in line.split()]
    assert set(copied) == {"setup.py", "pyproject.toml", "README.md", "vqgan_jax", "configs"}
    assert all((fakes.ROOT / name).exists() for name in copied)
    ignore = (fakes.ROOT / "launch/kubernetes/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(copied)
    extras = re.findall(r'^        "(\w+)": \[', (fakes.ROOT / "setup.py").read_text(), re.M)
    assert {"tpu", "cuda"} <= set(extras)

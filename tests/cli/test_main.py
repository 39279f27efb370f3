import os
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from command_lines import flags
from places import SUPPORT
from serve_fakes import RANK_ERROR, FakeEngine

from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.server import ServerConfig
from moe_runtime.types.version import __version__
from moe_runtime.wire.executor import RankError

HEAVY = ("torch", "numpy", "transformers", "fastapi", "pydantic", "uvicorn", "zmq", "msgspec", "yaml", "matplotlib")
ENGINE_FLAGS = {
    "tokenizer": "words",
    "ep_size": 2,
    "dtype": "bfloat16",
    "device": "cpu",
    "max_model_len": 99,
    "max_num_seqs": 7,
    "max_num_batched_tokens": 77,
    "block_size": 8,
    "kv_cache_memory_bytes": 12345678,
    "enable_prefix_caching": False,
    "kv_cache_dtype": "fp8",
    "quantization": "int4",
    "quantization_parts": "experts,head",
    "quantization_group_size": 64,
    "activation_quantization": "int8",
    "load_format": "dummy",
    "check_weights": True,
    "generation_config": "none",
    "skip_tokenizer_init": True,
    "seed": 3,
    "batch_invariant": True,
    "enforce_eager": True,
    "dispatcher": "all_gather",
    "balance": "auto",
    "balance_interval": 9,
    "redundant_experts": 1,
    "migration_bytes_per_step": 77,
    "placement": "placement.json",
    "routing": "top_p=0.75",
    "routing_calibration": "calibration.json",
    "capacity_factor": 1.25,
    "overflow": "reroute",
    "balance_epsilon": 0.05,
    "record_trace": "trace.npz",
    "overload_routing": "top_k=2",
    "overload_queue": [9, 3],
    "decode_slowdown": 1.5,
    "max_queue": 7,
    "queue_timeout": 2.5,
    "served_model_name": "name",
    "step_timeout": 1.5,
}
SERVER_FLAGS = {
    "host": "0.0.0.0",
    "port": 0,
    "api_key_file": "keys",
    "admin_key_file": "admin-keys",
    "max_body_bytes": 1000,
    "max_bytes_under_way": 2000,
    "max_connections": 30,
    "max_prompts_per_request": 4,
    "max_choices": 5,
    "max_stop_strings": 6,
    "max_stop_chars": 7,
    "max_logit_bias": 8,
    "max_tools": 9,
    "header_timeout": 1.5,
    "body_timeout": 2.5,
    "send_timeout": 4.5,
    "request_timeout": 3.5,
    "tool_call_parser": "hermes",
    "reasoning_parser": "deepseek_r1",
    "escape_special_tokens": True,
}


@pytest.fixture
def served(monkeypatch):
    """Arguments of `run_server`: (the engine's configuration, the server's)."""
    calls = []
    monkeypatch.setattr("moe_runtime.build.build_engine", lambda config: config)
    monkeypatch.setattr(
        "moe_runtime.serve.server.run_server",
        lambda make_engine, config: calls.append((make_engine(), config)) or 0,
    )
    return calls


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in ("generate", "serve", "bench", "inspect"))]
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\nfrom moe_runtime.cli.main import main\n"
        f"try: main({arguments})\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"
    assert "moe-runtime" in done.stdout


def test_the_module_is_the_command():
    command = [sys.executable, "-P", "-m", "moe_runtime", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"moe-runtime {__version__}\n"


def test_every_engine_option_is_a_flag(served):
    assert set(ENGINE_FLAGS) == {field.name for field in fields(EngineConfig)} - {"model"}
    assert cli.main(["serve", "here", *flags(ENGINE_FLAGS)]) == 0
    assert served == [(EngineConfig("here", **ENGINE_FLAGS), ServerConfig())]


def test_every_server_option_is_a_flag(served):
    assert set(SERVER_FLAGS) | {"cors_origin"} == {field.name for field in fields(ServerConfig)}
    origins = ("https://a.example", "https://b.example")
    given = [argument for origin in origins for argument in ("--cors-origin", origin)]
    assert cli.main(["serve", "here", *flags(SERVER_FLAGS), *given]) == 0
    assert served == [(EngineConfig("here"), ServerConfig(**SERVER_FLAGS, cors_origin=origins))]


def test_serve_by_default(served):
    assert cli.main(["serve", "demo"]) == 0
    assert served == [(EngineConfig("demo"), ServerConfig())]


def test_serve_under_torchrun(monkeypatch):
    calls = []
    environment = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (environment | {"MASTER_ADDR": "here", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("moe_runtime.cli.launch.serve_torchrun", lambda *arguments: calls.append(arguments) or 5)
    assert cli.main(["serve", "demo", "--port", "81", "--redundant-experts", "1,0"]) == 5
    assert calls == [(EngineConfig("demo", ep_size=2, redundant_experts=(1, 0)), ServerConfig(port=81))]


def test_a_file_of_options_and_flags_that_win(served, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        yaml.safe_dump({"model": "here", "ep-size": 4, "dtype": "float32", "port": 9, "max_model_len": None})
    )
    assert cli.main(["serve", "--config", str(file), "--ep-size", "2"]) == 0
    assert cli.main(["serve", "there", "--config", str(file)]) == 0
    assert served == [
        (EngineConfig("here", ep_size=2, dtype="float32"), ServerConfig(port=9)),
        (EngineConfig("there", ep_size=4, dtype="float32"), ServerConfig(port=9)),
    ]


@pytest.mark.parametrize("text", ["2,0", "'2,0'", "[2, 0]"])
def test_redundant_experts_of_each_rank(served, tmp_path, text):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: here\nep_size: 2\nredundant-experts: {text}\n")
    assert cli.main(["serve", "--config", str(file)]) == 0
    assert cli.main(["serve", "here", "--ep-size", "2", "--redundant-experts", "2,0"]) == 0
    assert cli.main(["serve", "--config", str(file), "--redundant-experts", "1"]) == 0
    assert [config.redundant_experts for config, _ in served] == [(2, 0), (2, 0), 1]


BAD = [
    (["serve"], "model: missing; it must be a local"),
    (["serve", "x", "--ep-size", "two"], "ep_size: 'two' is not allowed; it must be an integer"),
    (["serve", "x", "--ep-size", "0"], "ep_size: 0 is not allowed"),
    (["serve", "x", "--redundant-experts", "1,b"], "redundant_experts: 'b' is not allowed; it must be an integer"),
    (
        ["serve", "x", "--ep-size", "4", "--redundant-experts", "1,2"],
        "redundant_experts: [1, 2] is not allowed; it must be an integer of at least 0, or one per rank (4)",
    ),
    (["serve", "x", "--dtype", "int3"], "dtype: 'int3' is not allowed"),
    (["serve", "x", "--port", "-1"], "port: -1 is not allowed"),
    (["serve", "x", "--bogus"], "unrecognized arguments: --bogus"),
    (["serve", "x", "--ep", "2"], "unrecognized arguments: --ep"),
    (["serve", "x", "--config", "/no/such.yaml"], "config: '/no/such.yaml' cannot be read (No such file or directory)"),
    (["generate", "x"], "prompt: missing"),
    (["generate", "x", "--prompt", "a", "--top-p", "7"], "top_p: 7.0 is not allowed"),
    (
        ["generate", "x", "--prompt", "a", "--temperature", "hot"],
        "temperature: 'hot' is not allowed; it must be a number",
    ),
    (["generate", "x", "--prompt", ""], "prompt: it is empty"),
    (["generate", "x", "--prompt-token-ids", "1,b"], "prompt_token_ids: 'b' is not allowed; it must be an integer"),
    (["generate", "x", "--prompt-token-ids", "1,100000"], "prompt: token id 100000 is not allowed"),
    (["generate", "x", "--prompt", "a", "--raw", "--chat"], "chat: not allowed with argument --raw"),
    (["generate", "x", "--prompt", "a", "--chat", "--skip-tokenizer-init"], "chat: not allowed without a tokenizer"),
    (["generate", "x", "--prompt", "a", "--heatmap", "load.gif"], "heatmap: 'load.gif' is not allowed"),
    (
        ["generate", "x", "--prompt", "a", "--heatmap", "/no/such/load.png"],
        "heatmap: '/no/such/load.png' is not allowed; it must be in a folder that exists",
    ),
    (["heatmap", "--url", "http://127.0.0.1:1", "-o", "x.gif"], "output: 'x.gif' is not allowed; it must end in .png"),
    (
        ["heatmap", "--url", "http://127.0.0.1:1", "-o", "/no/such/x.png"],
        "output: '/no/such/x.png' is not allowed; it must be in a folder that exists",
    ),
    (
        ["heatmap", "--load", "/no/such.json", "--before", "/no/such.json", "-o", "x.svg"],
        "output: 'x.svg' is not allowed; it must end in .png\n",
    ),
    (["heatmap", "-o", "x.png"], "one of the arguments --url --load"),
    (["heatmap", "--load", "/no/such.json", "-o", "x.png"], "/no/such.json: No such file or directory"),
    (["heatmap", "--load", "load.gif", "-o", "x.png"], "load.gif: suffix 'gif' is not allowed"),
    (["heatmap", "--url", "ftp://x", "-o", "x.png"], "url: 'ftp://x' is not allowed"),
    (["heatmap", "--url", "http://127.0.0.1:1", "-o", "x.png"], "url: 'http://127.0.0.1:1' returned no load"),
    ([], "the following arguments are required: COMMAND"),
    (["fly"], "COMMAND: invalid choice: 'fly'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(built, arguments, message, capsys):
    raw = ["--raw"] if arguments[:3] == ["generate", "x", "--prompt"] and arguments[3] == "" else []
    assert cli.main([*arguments, *raw]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"moe-runtime: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert all(engine.closed for engine in built)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ep_sise: 2", "ep_sise: no such option in "),
        ("top_k: 2", "top_k: no such option in "),
        ("- 1", "config: "),
        ("a: [", "config: "),
        ("ep_size: two", "ep_size: 'two' is not allowed"),
        ("port: '80'", "port: '80' is not allowed"),
        ("host: 5", "host: 5 is not allowed"),
        ("skip_tokenizer_init: 1", "skip_tokenizer_init: 1 is not allowed"),
    ],
)
def test_bad_files_get_one_line(served, tmp_path, content, message, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert cli.main(["serve", "x", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moe-runtime: error: {message}") and error.count("\n") == 1
    assert not served


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (RankError(RANK_ERROR), 1, f"moe-runtime: error: {RANK_ERROR}\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_run_ends(built, monkeypatch, capsys, error, code, output):
    monkeypatch.setattr(FakeEngine, "step", lambda self: (_ for _ in ()).throw(error))
    assert cli.main(["generate", "x", "--prompt", "a"]) == code
    assert capsys.readouterr().err == output
    assert built[0].closed


def test_a_mistake_of_ours_keeps_its_traceback(built, monkeypatch):
    monkeypatch.setattr(FakeEngine, "step", lambda self: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["generate", "x", "--prompt", "a"])
    assert built[0].closed


def test_output_that_nobody_reads():
    program = (
        f"import sys; sys.path[:0] = [{str(SUPPORT)!r}]\n"
        "import moe_runtime.build\nfrom serve_fakes import FakeEngine\nfrom moe_runtime.cli.main import main\n"
        "moe_runtime.build.build_engine = FakeEngine\n"
        "sys.exit(main(['generate', 'x', '--prompt', 'a']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 141

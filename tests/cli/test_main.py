import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from places import SUPPORT
from serve_clients import ServerThread
from serve_fakes import RANK_ERROR, FakeEngine

from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.server import ServerConfig
from moe_runtime.types.sampling_params import SamplingParams
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
    "load_format": "dummy",
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
    "request_timeout": 3.5,
    "tool_call_parser": "hermes",
    "reasoning_parser": "deepseek_r1",
    "escape_special_tokens": True,
}
SAMPLING_FLAGS = {
    "min_tokens": 3,
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 1.0,
    "seed": 3,
    "stop": ["a, b", "c"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
    "logprobs": 1,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "routing": "fast",
    "return_routed_experts": True,
}


def flags(values):
    """The command line that sets these options."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value is False:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "stop":
            words += [word for text in value for word in (flag, text)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


@pytest.fixture
def built(monkeypatch):
    """Engines that the command built: their configurations, and the engines themselves."""
    engines = []

    def build_engine(config):
        engines.append(FakeEngine(config, tokenizer=None) if config.skip_tokenizer_init else FakeEngine(config))
        return engines[-1]

    monkeypatch.setattr("moe_runtime.build.build_engine", build_engine)
    return engines


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


def test_every_sampling_option_is_a_flag(built, capsys):
    assert set(SAMPLING_FLAGS) == {field.name for field in fields(SamplingParams)} - {"n", "logit_bias"}
    assert cli.main(["generate", "here", "--prompt", "hi", *flags(SAMPLING_FLAGS)]) == 0
    (engine,) = built
    assert engine.added[0][2] == SamplingParams(**SAMPLING_FLAGS)
    assert engine.config == EngineConfig("here", seed=3, routing="fast")
    assert engine.closed


def test_sampling_options_in_a_file(built, tmp_path):
    file = tmp_path / "generate.yaml"
    file.write_text("stop: [x, y]\ntop-k: 2\nseed: 9\n")
    assert cli.main(["generate", "here", "--config", str(file), "--prompt", "hi"]) == 0
    assert built[0].added[0][2] == SamplingParams(stop=["x", "y"], top_k=2, seed=9, max_tokens=256)
    assert built[0].config.seed == 9


def test_generate_one_prompt(built, capsys):
    assert cli.main(["generate", "--prompt", "hello sea", "--max-tokens", "3", "here"]) == 0
    captured = capsys.readouterr()
    assert captured.out == " 4 5 6\n"
    assert captured.err.startswith("1 prompt tokens, 3 generated in ")
    assert captured.err.count("\n") == 1 and captured.err.endswith(" tok/s)\n")


@pytest.mark.parametrize(("form", "tokens"), [([], [4, 5, 3]), (["--chat"], [4, 5, 3]), (["--raw"], [5, 3])])
def test_a_prompt_is_a_message_unless_it_is_raw(built, form, tokens):
    assert cli.main(["generate", "here", "--prompt", "hello sea", *form]) == 0
    assert built[0].added[0][1] == tokens


def test_a_model_without_a_chat_template_continues_prompts(built, monkeypatch):
    monkeypatch.setattr("serve_fakes.FakeTokenizer.has_chat_template", False)
    assert cli.main(["generate", "here", "--prompt", "hello sea"]) == 0
    assert built[0].added[0][1] == [5, 3]


def test_generate_several_prompts(built, capsys):
    words = ["--prompt", "a bb", "--prompt-token-ids", "1,2", "--prompt", "ccc", "--raw", "--max-tokens", "2"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out == ">>> a bb\n 3 4\n\n>>> ccc\n 4 5\n\n>>> 1,2\n 3 4\n\n"


def test_generate_without_a_tokenizer(built, capsys):
    words = ["--skip-tokenizer-init", "--prompt-token-ids", "7", "--max-tokens", "3"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out == "8,9,10\n"


def test_logprobs_are_printed(built, capsys):
    words = ["--prompt-token-ids", "8", "--max-tokens", "2", "--logprobs", "1", "--prompt-logprobs", "0"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        " 9 10",
        "output ' 9':-3.0000#3 | ' 110':-1.0000#1",
        "output ' 10':-3.0000#3 | ' 111':-1.0000#1",
    ]


def test_text_comes_as_it_is_made_on_a_terminal(built, capsys, monkeypatch):
    seen = []
    step = FakeEngine.step
    monkeypatch.setattr(FakeEngine, "step", lambda self: seen.append(capsys.readouterr().out) or step(self))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["generate", "here", "--prompt", "a", "--raw", "--max-tokens", "3"]) == 0
    assert [*seen, capsys.readouterr().out] == ["", " 2", " 3", " 4\n"]


def test_generate_writes_a_heatmap(built, tmp_path):
    path = tmp_path / "load.json"
    assert cli.main(["generate", "here", "--prompt", "a", "--heatmap", str(path)]) == 0
    assert ExpertLoad.load(path) == FakeEngine().expert_load()


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


def test_heatmap_of_a_server(tmp_path):
    outputs = [tmp_path / f"load.{suffix}" for suffix in ("png", "svg", "html", "csv", "json", "npz")]
    with ServerThread(FakeEngine) as server:
        words = [word for path in outputs for word in ("-o", str(path))]
        assert cli.main(["heatmap", "--url", server.url + "/", *words]) == 0
    assert outputs[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in outputs[1].read_text() and "<html" in outputs[2].read_text()
    for path in outputs[3:]:
        assert ExpertLoad.load(path) == FakeEngine().expert_load()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_heatmap_of_a_file_and_a_phase(tmp_path, phase):
    saved, picture, table = tmp_path / "load.npz", tmp_path / "load.png", tmp_path / "load.json"
    load = FakeEngine().expert_load()
    load.save(saved)
    words = ["--load", str(saved), "-o", str(picture), "-o", str(table), "--phase", phase]
    assert cli.main(["heatmap", *words]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(table.read_text())["phases"]
    other = {"prefill": "decode", "decode": "prefill"}[phase]
    assert content[phase] == load.counts(phase).tolist()
    assert content[other] == (load.counts(other) * 0).tolist()


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

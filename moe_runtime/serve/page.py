"""The page at `/`: the served model, links, and the heatmap. The page at `/docs`: all routes."""

from __future__ import annotations

from html import escape
from pathlib import Path

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.types.version import __version__

LINKS = (
    ("/docs", "all routes, to try out"),
    ("/version", "the server's version"),
    ("/health", "model, ranks, kernels"),
    ("/ready", "whether requests are taken"),
    ("/metrics", "Prometheus metrics"),
    ("/v1/models", "the model, for OpenAI's clients"),
    ("/experts/load", "tokens per expert"),
    ("/experts/placement", "experts per rank"),
    ("/experts/decisions", "what the balancer decided"),
    ("/experts/heatmap.html", "the heatmap, interactive"),
)

DOCS = Path(__file__).parent / "docs.html"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>moe_runtime: {model}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
code {{ background: #f3f3f3; padding: 0.1rem 0.3rem; }}
img {{ width: 100%; border: 1px solid #ddd; }}
</style>
</head>
<body>
<h1>{model}</h1>
<p>Served by moe_runtime {version}. State: {state}.</p>
<ul>
{links}
</ul>
<h2>Tokens per expert</h2>
<img id="heatmap" src="/experts/heatmap.svg" alt="Heatmap of tokens per layer and expert">
<script>
const image = document.getElementById("heatmap");
const reload = () => setTimeout(() => {{ image.src = "/experts/heatmap.svg?" + Date.now(); }}, 10000);
image.onload = reload;
image.onerror = reload;
</script>
</body>
</html>
"""


def index_page(engine: AsyncEngine) -> str:
    """The page as HTML. It loads no scripts or styles from other servers."""
    links = "\n".join(f'<li><a href="{path}"><code>{path}</code></a> {what}</li>' for path, what in LINKS)
    model = "loading" if engine.info is None else engine.info.model_name
    return PAGE.format(model=escape(model), version=__version__, state=escape(str(engine.state)), links=links)


def docs_page() -> str:
    """A page that shows `/openapi.json` and sends requests. It loads nothing else."""
    return DOCS.read_text(encoding="utf-8")

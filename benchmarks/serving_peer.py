"""What people write first: CrossEncoder behind FastAPI, one request at a time.

python -m benchmarks.serving_peer FOLDER --port PORT
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from sentence_transformers import CrossEncoder

from modeling_querit import console


def make_app(folder: str) -> FastAPI:
    """Make the application."""
    console.quiet_libraries()
    model = CrossEncoder(folder, trust_remote_code=True)
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/rerank")
    def rerank(body: dict[str, Any]) -> dict[str, Any]:
        pairs = [(body["query"], document) for document in body["documents"]]
        with lock:
            scores = model.predict(pairs, show_progress_bar=False).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return {"results": [{"index": index, "relevance_score": scores[index]} for index in order]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    uvicorn.run(make_app(args.folder), port=args.port, log_level="warning")

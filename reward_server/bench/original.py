"""The pattern that this service replaces: OCR in the event loop, one at a time.

It is there to be measured against. PaddleOCR's `predict` with its defaults (its own padding to 320
px, all cores for one picture), the same weights, the recogniser's confidence as the answer. Only
`throughput` starts it.
"""

import argparse
import base64
import io
import os

import numpy as np
from PIL import Image


def main() -> None:
    """Serve `/score` and `/health` until killed."""
    import uvicorn
    from fastapi import FastAPI

    from reward_server.alphabet import REC_FILE, bundled
    from reward_server.processes.serve import stop_with
    from reward_server.scorers.ocr.weights import (
        offline_paddle,
        onnx_folder,
        recognition_config_of,
    )

    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--parent-pid", type=int)
    options = parser.parse_args()
    stop_with(options.parent_pid)
    weights = bundled(REC_FILE)
    with offline_paddle():
        from paddleocr import TextRecognition
    with onnx_folder(weights, recognition_config_of(weights)) as (folder, name):
        model = TextRecognition(
            model_name=name, model_dir=str(folder), engine="onnxruntime", device="cpu"
        )
    app = FastAPI()

    @app.post("/score")
    async def score(body: dict) -> dict:
        image = Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB")
        (result,) = model.predict(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))
        return {"ocr_text": result["rec_text"], "ocr_confidence": float(result["rec_score"])}

    @app.get("/health")
    async def health() -> dict:
        return {"pid": os.getpid()}

    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()

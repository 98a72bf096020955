# The server with the default model; `docker run ... FOLDER --host 0.0.0.0` serves another one.
FROM python:3.12-slim

RUN useradd --create-home querit
WORKDIR /app
# By version, as in the Makefile: a range would bring several gigabytes of CUDA packages.
RUN pip install --no-cache-dir torch==2.13.0
COPY setup.py pyproject.toml README.md LICENSE ./
COPY hub_cards hub_cards
COPY modeling_querit modeling_querit
RUN pip install --no-cache-dir ".[mini,serve]"

USER querit
# The mini is assembled here once; keep it in a volume.
RUN mkdir -p /home/querit/.cache/huggingface
VOLUME /home/querit/.cache/huggingface
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["querit", "serve"]
CMD ["mini", "--host", "0.0.0.0"]

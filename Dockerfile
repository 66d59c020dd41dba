# The service, without torch: docker build -t pillsnap-serve .
# For an NVIDIA GPU:
# docker build --build-arg "PACKAGES=openvino celery redis onnxruntime-gpu[cuda,cudnn]" -t pillsnap-serve .
FROM python:3.11-slim AS build
ARG PACKAGES="openvino celery redis"
WORKDIR /build
RUN python -m venv /opt/pillsnap
# What the package needs comes first, without the package: a change of the code installs none of it again.
COPY setup.py settings.ini constraints.txt ./
# The quotes are left out, PACKAGES may be several words.
# hadolint ignore=SC2086
RUN /opt/pillsnap/bin/pip install --no-cache-dir --constraint constraints.txt . $PACKAGES
COPY pillsnap pillsnap
RUN /opt/pillsnap/bin/pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim
# Hangul for the names in annotated pictures.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends fonts-nanum && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/pillsnap /opt/pillsnap
RUN useradd --system --uid 10001 --no-create-home pillsnap && mkdir -p /app/data/jobs && chown pillsnap /app/data/jobs
ENV PATH=/opt/pillsnap/bin:$PATH MODEL_PATH=/models PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["uvicorn", "pillsnap.serve:app", "--host", "0.0.0.0", "--port", "8000"]

# 运行 make demo 的镜像，CPU / An image that runs make demo on the CPU.  docs/installation.md
FROM python:3.11-slim
RUN apt-get update \
  && apt-get install --yes --no-install-recommends make g++ \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
# The CPU wheels of PyTorch, a tenth of the size of those with CUDA.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
RUN make setup
CMD ["make", "demo"]

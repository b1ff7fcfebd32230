# One image for both halves: `trunkline interface` and `trunkline worker`. With your own application:
#
#     FROM trunkline
#     COPY . /app
#     ENV APP=main:app
FROM python:3.13-slim

WORKDIR /usr/src/trunkline
COPY pyproject.toml README.md LICENSE ./
COPY channel_layer channel_layer
COPY interface_server interface_server
COPY worker worker
COPY trunkline trunkline
RUN pip install --no-cache-dir --disable-pip-version-check . \
    && rm -rf /usr/src/trunkline \
    && useradd --system --uid 10001 --no-create-home trunkline

# The chat example stands in until an application is copied over it.
COPY examples/chat /app
WORKDIR /app
ENV APP=chat:application \
    PYTHONUNBUFFERED=1 \
    TRUNKLINE_ADMIN_PORT=8001
# By its number, so that Kubernetes' runAsNonRoot can tell: trunkline.
USER 10001
EXPOSE 8000
# Asks on 127.0.0.1:8001, in the container: ready is who got a message through the broker just now.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["trunkline", "health"]
CMD ["trunkline", "--help"]

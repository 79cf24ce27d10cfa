"""Serving: OpenAI's protocol over HTTP on any engine.

  arguments  its flags, and who may use it
  errors     errors in the form of OpenAI's protocol
  requests   what requests look like
  responses  what responses look like
  planning   what a request asks of the engine: prompts as tokens, settings, constraints
  replies    from deltas to responses of the protocol: whole, or as events of a stream
  calls      a streamed answer's text and its calls of functions, told apart as they come
  queue      a fair queue before the engine, and the answers of one HTTP request on their way through it
  http       keys, size limits, errors in OpenAI's form, the log and the metrics
  grammar    answers that are JSON, or follow a JSON schema, token by token (through llguidance)
  app        the OpenAI-compatible HTTP application on any engine: create_app(engine, settings)

Others import: arguments, app.
"""

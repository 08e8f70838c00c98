// A worker on the official Node SDK, told what to do by lines of JSON on stdin; it reports by lines on stdout.
// Run with the folder of an npm installation of `iii-sdk` as the first argument.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const [folder, url, optionsText] = process.argv.slice(2)
const require = createRequire(`${folder}/package.json`)
const sdk = await import(pathToFileURL(require.resolve('iii-sdk').replace(/\.cjs$/, '.mjs')))
const options = JSON.parse(optionsText)

const report = (said) => process.stdout.write(`${JSON.stringify(said)}\n`)
const client = sdk.registerWorker(url, {
  workerName: 'node-worker',
  otel: { enabled: options.telemetry },
  headers: options.headers,
})
const functions = new Map()
const triggers = new Map()

function handler(functionId, answer, value) {
  return async (data) => {
    report({ event: 'called', function_id: functionId, data })
    if (answer === 'echo') return data
    if (answer === 'raise') throw new Error(value)
    if (answer === 'call') return await client.trigger({ function_id: value, payload: data })
    return value === null ? undefined : value
  }
}

async function call(command) {
  const request = { function_id: command.function_id, timeoutMs: command.timeout_ms ?? 30000 }
  if ('payload' in command) request.payload = command.payload
  if (command.void) request.action = sdk.TriggerAction.Void()
  if (command.queue) request.action = sdk.TriggerAction.Enqueue({ queue: command.queue })
  try {
    const result = await client.trigger(request)
    return { result: result === undefined ? null : result, undefined: result === undefined }
  } catch (error) {
    return { error: { code: error.code ?? error.name, message: error.message } }
  }
}

async function act(command) {
  switch (command.do) {
    case 'register':
      functions.set(command.id, client.registerFunction(command.id, handler(command.id, command.answer, command.value ?? null)))
      return {}
    case 'unregister':
      functions.get(command.id).unregister()
      return {}
    case 'trigger':
      triggers.set(
        command.name,
        client.registerTrigger({ type: command.type, function_id: command.function_id, config: command.config }),
      )
      return {}
    case 'untrigger':
      triggers.get(command.name).unregister()
      return {}
    case 'call':
      return await call(command)
    case 'stop':
      await client.shutdown()
      return {}
  }
}

report({ event: 'ready' })
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  report({ event: 'done', ...(await act(command)) })
  if (command.do === 'stop') process.exit(0)
}

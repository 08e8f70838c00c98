// What the reference's sample expects to be there: `iii`, the client. The sample passes `{ id }` where the published SDK
// takes the id alone; nothing else stands between the two.
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(`${process.env.SDK_FOLDER}/package.json`)
const { registerWorker } = await import(pathToFileURL(require.resolve('iii-sdk').replace(/\.cjs$/, '.mjs')))
const client = registerWorker(process.env.III_URL, { otel: { enabled: false } })

export const iii = {
  registerFunction: ({ id }, handler) => client.registerFunction(id, handler),
  registerTrigger: (trigger) => client.registerTrigger(trigger),
}

// The server takes the messages of one connection in order: what was registered before this call is known after it.
export const settled = () => client.trigger({ function_id: 'engine::functions::list', payload: {} })

// A batch job that pushes its metrics by prom-client. It counts the lines of a
// file:
//
//     npm install
//     node job.js /etc/hosts
//     node job.js --delete /etc/hosts
//
// CULVERT_URL names the proxy, http://localhost:8080 by default.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const { Gauge, Pushgateway, Registry } = require('prom-client');

const url = process.env.CULVERT_URL || 'http://localhost:8080';

async function main(args) {
  const remove = args[0] === '--delete';
  const file = args[remove ? 1 : 0];
  if (!file) {
    throw new Error('usage: node job.js [--delete] FILE');
  }
  const group = {
    jobName: 'example_node',
    // One group for each file. prom-client leaves it to us to write slashes in base64.
    groupings: { 'file@base64': Buffer.from(path.resolve(file)).toString('base64url') },
  };
  // A registry of its own: the default one has metrics of the process too.
  const registry = new Registry();
  // push_up becomes 0 where no push comes for 24 h and a grace of 10 %.
  const options = { timeout: 10000, headers: { 'Culvert-Interval': '24h' } };
  const gateway = new Pushgateway(url, options, registry);
  if (remove) {
    await gateway.delete(group);
    return;
  }

  const gauge = (name, help, value) => new Gauge({ name, help, registers: [registry] }).set(value);
  const start = process.hrtime.bigint();
  let text;
  let failure;
  try {
    text = fs.readFileSync(file, 'latin1');
  } catch (err) {
    failure = err;
  }
  gauge('linecount_duration_seconds', 'How long the last count took.', Number(process.hrtime.bigint() - start) / 1e9);
  gauge('linecount_success', '1 if the last count succeeded, else 0.', failure ? 0 : 1);
  if (failure) {
    // This replaces only the metrics that it brings, so the last success stays.
    await gateway.pushAdd(group);
    throw failure;
  }
  gauge('linecount_last_success_time_seconds', 'When a count succeeded last.', Date.now() / 1000);
  gauge('linecount_lines', 'Lines of the file.', text.split('\n').length - 1);
  // This replaces all metrics of the group.
  await gateway.push(group);
}

main(process.argv.slice(2)).catch(err => {
  console.error(`job.js: ${err.message}`);
  process.exitCode = 1;
});

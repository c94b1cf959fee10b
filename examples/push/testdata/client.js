// Calls all of prom-client's push functions that a grouping key can go through.
// push_test.go knows what must be in a scrape afterwards.
'use strict';

const assert = require('node:assert');
const { collectDefaultMetrics, Counter, Gauge, Histogram, Pushgateway, Registry, Summary } = require('prom-client');

const url = process.env.CULVERT_URL;

// Each is [gateway, options, jobName, groupings].
const groups = [
  [url, {}, 'js_plain', undefined],
  [`${url}/`, {}, 'js_slash_behind', undefined],
  [url, {}, 'js_instance', { instance: 'web-1' }],
  [url, {}, 'js_base64', { 'path@base64': Buffer.from('/srv/data').toString('base64url'), b: 'x' }],
  [url, {}, 'js_empty', { 'empty@base64': '=' }],
  [url, {}, 'js_ünicöde', { city: 'Zürich ☃' }],
  [url, {}, 'js_reserved', { v: '50% & a+b=c?#@' }],
  [url, {}, 'js_number', { shard: 7 }],
  [url, { auth: 'somebody:secret', timeout: 10000 }, 'js_password', undefined],
  [url, { headers: { 'Content-Encoding': 'gzip' } }, 'js_gzip', undefined],
  [url, { headers: { 'Culvert-Interval': '24h' } }, 'js_interval', undefined],
];

const one = (name, value) => {
  const registry = new Registry();
  new Gauge({ name, help: 'Of a test.', registers: [registry] }).set(value);
  return registry;
};

const allTypes = () => {
  const registry = new Registry();
  const common = { help: 'Of a test.', registers: [registry] };
  new Counter({ name: 'js_things_total', labelNames: ['kind'], ...common }).inc({ kind: 'a "b"\\\n' }, 3);
  new Summary({ name: 'js_took_seconds', percentiles: [0.5], ...common }).observe(1.5);
  new Histogram({ name: 'js_sizes', buckets: [1, 2.5, 10], ...common }).observe(2);
  return registry;
};

const status = async (want, answer) => assert.strictEqual((await answer).resp.statusCode, want);

async function push() {
  for (const [gateway, options, jobName, groupings] of groups) {
    await status(200, new Pushgateway(gateway, options, one('js_old', 1)).push({ jobName, groupings }));
    await status(200, new Pushgateway(gateway, options, one('js_pushed', 2)).push({ jobName, groupings }));
    await status(200, new Pushgateway(gateway, options, one('js_added', 3)).pushAdd({ jobName, groupings }));
  }
  await status(200, new Pushgateway(url, {}, allTypes()).push({ jobName: 'js_types' }));
  collectDefaultMetrics();
  await status(200, new Pushgateway(url).pushAdd({ jobName: 'js_default' })); // the default registry
}

async function remove() {
  for (const [gateway, options, jobName, groupings] of groups) {
    await status(202, new Pushgateway(gateway, options).delete({ jobName, groupings }));
  }
  await status(202, new Pushgateway(url).delete({ jobName: 'js_types' }));
  await status(202, new Pushgateway(url).delete({ jobName: 'js_default' }));
  await status(202, new Pushgateway(url).delete({ jobName: 'js_never_pushed' }));
}

({ push, delete: remove })[process.argv[2]]().catch(err => {
  console.error(err);
  process.exitCode = 1;
});

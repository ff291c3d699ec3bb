// Check that each name in a rule of .github/renovate.json matches a dependency, and print what the rules decide about each.
// Usage: node check.mjs RENOVATE LOG
// RENOVATE is the folder of Renovate's package. LOG is the JSON log of `renovate --dry-run=extract`, with all dependencies.
import { readFileSync } from "node:fs";

const [renovate, log] = process.argv.slice(2);
await (await import(`${renovate}/dist/logger/index.js`)).init();
const { applyPackageRules } = await import(`${renovate}/dist/util/package-rules/index.js`);
const { resolveConfigPresets } = await import(`${renovate}/dist/config/presets/index.js`);

const lines = readFileSync(log, "utf8").split("\n").filter((line) => line.startsWith("{"));
const { packageFiles } = lines.map((line) => JSON.parse(line)).find((line) => line.msg === "Extracted dependencies");
// Extraction itself disables the dependencies of dependencies, which a lock names.
const dependencies = Object.entries(packageFiles).flatMap(([manager, files]) =>
  files.flatMap(({ packageFile, deps }) =>
    deps
      .filter(({ depName, enabled }) => depName && enabled !== false)
      .map((dependency) => ({ manager, packageFile, packageName: dependency.depName, ...dependency })),
  ),
);
const own = JSON.parse(readFileSync(".github/renovate.json"));
const { config } = await resolveConfigPresets(own);

const decided = new Map();
for (const dependency of dependencies) {
  const { manager, packageName, currentValue } = dependency;
  const { enabled, allowedVersions } = await applyPackageRules({ ...config, ...dependency });
  const decision = enabled === false ? "held" : allowedVersions ? `only ${allowedVersions}` : "updated";
  decided.set(`${manager}\t${packageName}\t${currentValue ?? ""}\t${decision}`, true);
}
console.log([...decided.keys()].sort().join("\n"));

for (const rule of own.packageRules) {
  for (const name of rule.matchPackageNames) {
    const packageRules = [{ ...rule, matchPackageNames: [name], enabled: true, marked: true }];
    const results = await Promise.all(dependencies.map((dependency) => applyPackageRules({ ...dependency, packageRules })));
    if (!results.some(({ marked }) => marked)) {
      console.error(`make: a rule of .github/renovate.json is for ${name}, but no dependency has this name`);
      process.exitCode = 1;
    }
  }
}

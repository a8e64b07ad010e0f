// A small reader of flash models on zarrita: `node flash_reader.mjs < request.json > answer.json`.
//
// It shows that a Zarr library of another language finds in a model what SPEC.md says is there. Every weight comes
// through zarrita, which asks a store of two functions for keys and byte ranges; one neuron is one range of a shard.
// Beyond that it knows the end of a ZIP archive (section 4.2), the manifest (section 7) and the encodings (section 9).
//
// It is no validator: it takes sound documents at their word. It refuses what a reader must look at to read at all, and
// claims these rules and no others: versions and features that it does not know, documents that `JSON.parse` refuses or
// that fail their checksum, and shard indices that contradict the stride.

import { createHash } from "node:crypto";
import { closeSync, fstatSync, openSync, readFileSync, readSync, readdirSync, statSync } from "node:fs";
import { join, relative, sep } from "node:path";
import * as zarr from "zarrita";

const CAPABILITIES = {
  name: "zarrita",
  spec: "1.0",
  levels: ["structure", "values"],
  containers: ["directory", "file"],
  encodings: ["bf16", "f16", "f32", "q4", "q8", "u32", "u8"],
  codecs: ["blosc", "raw", "zstd"],
  rules: [
    "FF-BND-7", "FF-IDX", "FF-JSON-1", "FF-JSON-2", "FF-JSON-5", "FF-JSON-6", "FF-LIM-3", "FF-SUM-1", "FF-SUM-2",
    "FF-VER",
  ],
};
const REJECTED = 65;
const MAX_DOCUMENT_BYTES = 1 << 20;
const CHECKSUM_FIELD = '"metadata_crc32c":"';
const GEOMETRY = ["alignment", "d_model", "encoding", "n_neurons", "part_nbytes", "parts", "row_nbytes", "stride"];

// Section 7. Fields of each object: [kind of value, default]; a field without a default is required.
const FIELDS = {
  Manifest: {
    version: ["plain"], metadata_crc32c: ["plain"], name: ["plain"], decoder: ["Decoder"], provenance: ["Provenance"],
    tokens: ["SpecialTokens", {}], required_features: ["plain", []], optional_features: ["plain", []],
    predictors: ["Predictor", []], statistics: ["Statistics", null],
  },
  Decoder: {
    vocab_size: ["plain"], d_model: ["plain"], context_tokens: ["plain"], embedding: ["Embedding"],
    positions: ["LearnedPositions", null], rotary: ["Rotary", []], norm: ["Norm"], embedding_norm: ["plain", false],
    final_norm: ["plain", true], block: ["Block", {}], attention: ["Attention"], ffn: ["FeedForward"],
    logits: ["Logits"], layers: ["Layer"],
  },
  Embedding: { d_embed: ["plain"], scale: ["number", 1], projection: ["plain", false] },
  LearnedPositions: { n_rows: ["plain"], offset: ["plain", 0] },
  Rotary: { name: ["plain"], n_dims: ["plain"], pairing: ["plain", "half"], attention_factor: ["number", 1] },
  Norm: {
    kind: ["plain"], eps: ["number"], weight: ["plain", true], weight_offset: ["number", 0], bias: ["plain", false],
  },
  Block: { order: ["plain", "pre_norm"], shared_norm: ["plain", false] },
  Attention: {
    n_heads: ["plain"], n_kv_heads: ["plain"], head_dim: ["plain"], scale: ["number"], qkv_bias: ["plain", false],
    output_bias: ["plain", false], qk_norm: ["Norm", null], qk_norm_over: ["plain", "head"],
  },
  FeedForward: {
    kind: ["plain"], d_ff: ["plain"], activation: ["Activation"], up_activation: ["Activation", { kind: "identity" }],
    gate_bias: ["plain", false], up_bias: ["plain", false], down_bias: ["plain", false],
  },
  Activation: { kind: ["plain"], threshold: ["number", 0] },
  Logits: { tied: ["plain"], bias: ["plain", false], scale: ["number", 1], softcap: ["number", null] },
  Layer: { rotary: ["plain", null], attention_window_tokens: ["plain", null] },
  SpecialTokens: { bos: ["plain", null], eos: ["plain", []], add_bos: ["plain", false] },
  Provenance: {
    writer: ["plain"], source: ["plain"], source_format: ["plain"], source_sha256: ["plain", null],
    architecture: ["plain", ""], licence: ["plain", null],
  },
  Predictor: {
    layer: ["plain"], kind: ["plain"], tap: ["InputTap"], threshold: ["number"], rank: ["plain", null],
    bias: ["plain", false], signed: ["plain", true], measured: ["Measured", null],
  },
  InputTap: { layer: ["plain"], point: ["plain", "ffn_input"] },
  Measured: {
    recall: ["number"], precision: ["number"], predicted_fraction: ["number"], n_tokens: ["plain"], text: ["plain"],
    perplexity_ratio: ["number", null],
  },
  Statistics: { n_tokens: ["plain"], text: ["plain"], window_tokens: ["plain"] },
};

/** The model breaks a rule that this reader knows. */
class Rejected extends Error {
  constructor(rule) {
    super(rule);
    this.rule = rule;
  }
}

/** `nbytes` bytes of a file from `offset` on; a short read is an error. */
function readRange(path, offset, nbytes) {
  const file = openSync(path, "r");
  try {
    const data = new Uint8Array(nbytes);
    for (let n = 0; n < nbytes; ) {
      const got = readSync(file, data, n, nbytes - n, offset + n);
      if (got === 0) throw new Error(`${path}: the file ends before byte ${offset + nbytes}`);
      n += got;
    }
    return data;
  } finally {
    closeSync(file);
  }
}

/** A store of zarrita: keys to byte ranges of files, in either container. */
class ByteRanges {
  constructor(path) {
    this.container = statSync(path).isDirectory() ? "directory" : "file";
    this.extents = this.container === "file" ? centralDirectory(path) : filesBelow(path);
    if (!this.extents.has("zarr.json")) throw new Rejected(this.container === "file" ? "FF-ZIP-12" : "FF-DIR-1");
  }

  read(key, start = 0, nbytes = this.extents.get(key).nbytes - start) {
    const { path, offset } = this.extents.get(key);
    return readRange(path, offset + start, nbytes);
  }

  /** Bytes of a key. Documents say uint16 for float16, an element type that Node 20 lacks. */
  async get(absolute) {
    const key = absolute.slice(1);
    if (!this.extents.has(key)) return undefined;
    if (!key.endsWith("/zarr.json")) return this.read(key);
    const document = JSON.parse(utf8(this.read(key)));
    if (document.data_type === "float16") document.data_type = "uint16";
    return new TextEncoder().encode(JSON.stringify(document));
  }

  async getRange(absolute, range) {
    const key = absolute.slice(1);
    const extent = this.extents.get(key);
    if (extent === undefined) return undefined;
    const { offset, length } =
      "suffixLength" in range ? { offset: extent.nbytes - range.suffixLength, length: range.suffixLength } : range;
    if (offset < 0 || offset + length > extent.nbytes) throw new Error(`${key}: a range beyond its end`);
    return this.read(key, offset, length);
  }
}

function filesBelow(root) {
  const extents = new Map();
  for (const entry of readdirSync(root, { recursive: true, withFileTypes: true })) {
    if (entry.isDirectory()) continue;
    if (!entry.isFile()) throw new Rejected("FF-DIR-2");
    const path = join(entry.parentPath ?? entry.path, entry.name);
    extents.set(relative(root, path).split(sep).join("/"), { path, offset: 0, nbytes: statSync(path).size });
  }
  return extents;
}

/** Section 1, steps 2 and 3. */
function centralDirectory(path) {
  const file = openSync(path, "r");
  const size = fstatSync(file).size;
  closeSync(file);
  if (size < 98) throw new Rejected("FF-ZIP-2");
  const end = view(readRange(path, size - 98, 98));
  if (end.getUint32(0, true) !== 0x06064b50) throw new Rejected("FF-ZIP-2");
  const nEntries = uint64(end, 32);
  const nbytes = uint64(end, 40);
  if (uint64(end, 48) + nbytes !== size - 98) throw new Rejected("FF-ZIP-4");
  const bytes = readRange(path, size - 98 - nbytes, nbytes);
  const directory = view(bytes);
  const extents = new Map();
  for (let i = 0, at = 0; i < nEntries; i += 1) {
    if (at + 46 > nbytes || directory.getUint32(at, true) !== 0x02014b50) throw new Rejected("FF-ZIP-4");
    const nName = directory.getUint16(at + 28, true);
    const nExtra = directory.getUint16(at + 30, true);
    const key = utf8(bytes.subarray(at + 46, at + 46 + nName));
    const header = uint64(directory, at + 46 + nName + 20);
    const local = view(readRange(path, header, 30));
    const offset = header + 30 + local.getUint16(26, true) + local.getUint16(28, true);
    extents.set(key, { path, offset, nbytes: uint64(directory, at + 46 + nName + 4) });
    at += 46 + nName + nExtra;
  }
  return extents;
}

/** An open model: its documents checked against their checksum, its arrays through zarrita. */
class Model {
  constructor(path) {
    this.store = new ByteRanges(path);
    const keys = [...this.store.extents.keys()].filter((key) => key.split("/").at(-1) === "zarr.json");
    const texts = new Map(keys.sort().map((key) => [key, this.store.read(key)]));
    this.manifest = checkedManifest(texts);
    texts.delete("zarr.json");
    const documents = [...texts].map(([key, text]) => [key.slice(0, -"/zarr.json".length), parsed(text)]);
    this.arrays = new Map(documents.filter(([, document]) => document.node_type === "array"));
  }

  attributes(name) {
    return this.arrays.get(name).attributes.flashfmt;
  }

  /** Key and place of an array's one chunk. */
  place(name) {
    const key = `${name}/c${"/0".repeat(this.arrays.get(name).shape.length)}`;
    const extent = this.store.extents.get(key);
    if (extent === undefined) throw new Rejected("FF-ARR-12");
    return { key, offset: extent.offset, nbytes: extent.nbytes };
  }

  codec(name) {
    return this.arrays.get(name).codecs[1]?.name ?? "raw";
  }

  open(name) {
    this.place(name);
    return zarr.open.v3(zarr.root(this.store).resolve(name), { kind: "array" });
  }

  /** A tensor's numbers in C order: a Float32Array, or the integers of u8 and u32. */
  async tensor(name) {
    const { encoding, shape } = this.attributes(name);
    const { data } = await zarr.get(await this.open(name));
    return decoded(data, encoding, shape.at(-1));
  }

  /** Weights of one neuron, [parts, d_model] in C order: one inner chunk of the shard. */
  async bundle(layer, neuron) {
    const name = `layers/${layer}/ffn/bundles`;
    this.checkIndex(name);
    const { encoding, d_model: width } = this.attributes(name);
    const { data } = await zarr.get(await this.open(name), [neuron, null, null]);
    return decoded(data, encoding, width);
  }

  /** Section 11: the index says what the stride says, FF-IDX. */
  checkIndex(name) {
    const { n_neurons: n, stride, row_nbytes: rowNbytes } = this.attributes(name);
    const { key, nbytes } = this.place(name);
    if (nbytes !== n * (stride + 16) + 4) throw new Rejected("FF-BND-7");
    const bytes = this.store.read(key, n * stride);
    const index = view(bytes);
    if (crc32c(bytes.subarray(0, 16 * n)) !== index.getUint32(16 * n, true)) throw new Rejected("FF-IDX-2");
    for (let i = 0; i < n; i += 1) {
      if (uint64(index, 16 * i) !== i * stride || uint64(index, 16 * i + 8) !== rowNbytes) {
        throw new Rejected("FF-IDX-3");
      }
    }
  }
}

/** A document as section 5 asks for, as far as JSON.parse tells: it does not tell FF-JSON-3 and FF-JSON-4. */
function parsed(bytes) {
  if (bytes.length > MAX_DOCUMENT_BYTES) throw new Rejected("FF-LIM-3");
  let text;
  try {
    text = utf8(bytes);
  } catch {
    throw new Rejected("FF-JSON-1");
  }
  if (text.startsWith("\ufeff")) throw new Rejected("FF-JSON-1");
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Rejected("FF-JSON-2");
  }
  checkStrings(document);
  if (!isObject(document)) throw new Rejected("FF-JSON-5");
  return document;
}

function checkStrings(value) {
  if (typeof value === "string" && !value.isWellFormed()) throw new Rejected("FF-JSON-6");
  if (typeof value === "object" && value !== null) Object.entries(value).flat().forEach(checkStrings);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The manifest, after version, checksum and required features in the order of section 3. */
function checkedManifest(texts) {
  const root = texts.get("zarr.json");
  const manifest = parsed(root).attributes?.flashfmt;
  if (!isObject(manifest)) throw new Rejected("FF-MAN-1");
  const { version } = manifest;
  if (typeof version !== "string" || !/^(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})$/.test(version)) {
    throw new Rejected("FF-VER-3");
  }
  if (version.split(".")[0] !== "1") throw new Rejected("FF-VER-1");
  const at = Buffer.from(root).indexOf(CHECKSUM_FIELD);
  if (at < 0 || at !== Buffer.from(root).lastIndexOf(CHECKSUM_FIELD)) throw new Rejected("FF-SUM-2");
  let crc = 0;
  for (const [key, text] of texts) if (key !== "zarr.json") crc = crc32c(text, crc);
  const zeroed = root.slice();
  zeroed.fill("0".charCodeAt(0), at + CHECKSUM_FIELD.length, at + CHECKSUM_FIELD.length + 8);
  crc = crc32c(zeroed, crc);
  if (hex32(crc) !== manifest.metadata_crc32c) throw new Rejected("FF-SUM-1");
  if (manifest.required_features?.length) throw new Rejected("FF-VER-2");
  return manifest;
}

/** Section 9: stored numbers of an array, in C order, as a Float32Array; integers as they are. */
function decoded(stored, encoding, width) {
  if (encoding === "f32" || encoding === "u8" || encoding === "u32") return stored;
  if (encoding === "f16") return Float32Array.from(stored, half);
  if (encoding === "bf16") return new Float32Array(Uint32Array.from(stored, (bits) => bits << 16).buffer);
  const rowNbytes = encoding === "q8" ? 64 + width : roundUp(roundUp(width / 16, 64) + width / 2, 64);
  const decodeRow = encoding === "q8" ? decodeQ8 : decodeQ4;
  const nRows = stored.length / rowNbytes;
  const weights = new Float32Array(nRows * width);
  for (let row = 0; row < nRows; row += 1) {
    const raw = stored.subarray(row * rowNbytes, (row + 1) * rowNbytes);
    decodeRow(raw, weights.subarray(row * width, (row + 1) * width));
  }
  return weights;
}

function decodeQ8(raw, weights) {
  const row = view(raw);
  const scale = row.getFloat32(0, true);
  for (let j = 0; j < weights.length; j += 1) weights[j] = scale * row.getInt8(64 + j);
}

function decodeQ4(raw, weights) {
  const row = view(raw);
  const values = roundUp(weights.length / 16, 64);
  for (let j = 0; j < weights.length; j += 1) {
    const scale = half(row.getUint16(2 * Math.floor(j / 32), true));
    const byte = raw[values + 32 * Math.floor(j / 64) + (j % 32)];
    weights[j] = scale * ((j % 64 < 32 ? byte & 15 : byte >> 4) - 8);
  }
}

/** Value of a binary16 number. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
}

/** SHA-256 of the little-endian 32-bit values in C order, and the bits of the first, middle and last. */
function summary(numbers) {
  const words = numbers instanceof Uint8Array ? Uint32Array.from(numbers) : numbers;
  const bytes = new Uint8Array(4 * words.length);
  const out = view(bytes);
  const isFloat = words instanceof Float32Array;
  words.forEach((word, i) => (isFloat ? out.setFloat32(4 * i, word, true) : out.setUint32(4 * i, word, true)));
  const samples = [0, Math.floor(words.length / 2), words.length - 1].map((i) => hex32(out.getUint32(4 * i, true)));
  return { samples, sha256: sha256(bytes) };
}

/** A value of the manifest with the defaults filled in, unknown fields left out, and numbers as their bits. */
function completed(value, kind) {
  if (Array.isArray(value)) return value.map((member) => completed(member, kind));
  if (kind === "plain" || value === null) return value;
  if (kind === "number") {
    const bits = new DataView(new ArrayBuffer(8));
    bits.setFloat64(0, value);
    return bits.getBigUint64(0).toString(16).padStart(16, "0");
  }
  const fields = Object.entries(FIELDS[kind]);
  return Object.fromEntries(
    fields.map(([name, [member, initial]]) => [name, completed(name in value ? value[name] : initial, member)]),
  );
}

function pick(object, names) {
  return Object.fromEntries(names.map((name) => [name, object[name]]));
}

function structure({ path, bundles: chosen }) {
  const model = new Model(path);
  const answer = { container: model.store.container, manifest: completed(model.manifest, "Manifest") };
  Object.assign(answer, { tensors: {}, files: {}, bundles: [], chosen: [] });
  for (const [name, { shape }] of model.arrays) {
    const attributes = model.attributes(name);
    if (attributes.kind === "tensor") {
      const fields = { ...pick(attributes, ["encoding", "shape"]), storage_shape: shape, codec: model.codec(name) };
      answer.tensors[name] = { ...fields, ...model.place(name) };
    } else if (attributes.kind === "file") {
      answer.files[name.slice("files/".length)] = { ...pick(attributes, ["filename", "sha256"]), ...model.place(name) };
    }
  }
  for (let layer = 0; layer < model.manifest.decoder.layers.length; layer += 1) {
    const name = `layers/${layer}/ffn/bundles`;
    if (!model.arrays.has(name)) throw new Rejected("FF-MAN-11");
    model.checkIndex(name);
    answer.bundles.push({ ...pick(model.attributes(name), GEOMETRY), ...model.place(name) });
  }
  for (const [layer, neuron] of chosen) {
    const name = `layers/${layer}/ffn/bundles`;
    const { stride, row_nbytes: nbytes } = model.attributes(name);
    const { key, offset } = model.place(name);
    const digest = sha256(model.store.read(key, neuron * stride, nbytes));
    answer.chosen.push({ nbytes, offset: offset + neuron * stride, sha256: digest });
  }
  return answer;
}

async function values({ path, tensors, bundles }) {
  const model = new Model(path);
  const answer = { tensors: {}, bundles: [] };
  for (const name of tensors) answer.tensors[name] = summary(await model.tensor(name));
  for (const [layer, neuron] of bundles) answer.bundles.push(summary(await model.bundle(layer, neuron)));
  return answer;
}

const CRC32C = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc;
});

/** Section 13. */
function crc32c(bytes, crc = 0) {
  crc = ~crc;
  for (const byte of bytes) crc = CRC32C[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

function sha256(bytes) {
  return createHash("sha256").update(bytes).digest("hex");
}

function hex32(word) {
  return word.toString(16).padStart(8, "0");
}

function roundUp(value, multiple) {
  return Math.ceil(value / multiple) * multiple;
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A size or offset: beyond 2^53 no file has one. */
function uint64(bytes, at) {
  return Number(bytes.getBigUint64(at, true));
}

function utf8(bytes) {
  return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
}

/** Sorted keys, no white space, ASCII. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (typeof value === "object" && value !== null) {
    const keys = Object.keys(value).sort();
    return `{${keys.map((key) => `${canonical(key)}:${canonical(value[key])}`).join(",")}}`;
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

const LEVELS = { capabilities: () => CAPABILITIES, structure, values };
const request = JSON.parse(readFileSync(0, "utf8"));
let answer;
try {
  answer = await LEVELS[request.level](request);
} catch (error) {
  if (!(error instanceof Rejected)) throw error;
  answer = { rule: error.rule };
  process.exitCode = REJECTED;
}
process.stdout.write(`${canonical(answer)}\n`);

// Package storage is the built-in storage server: a small durable key-value
// store over HTTP, so that a grid has something to run where no other storage
// server is installed.
//
//	PUT    /kv/KEY    204 once the body is on disk as the key's value
//	GET    /kv/KEY    200 and the value, or 404
//	HEAD   /kv/KEY    as GET, without the value
//	DELETE /kv/KEY    204, also where there was no such key
//	GET    /kv        {"keys":[...],"next":"..."}; prefix, after and limit choose which
//	GET    /healthz   {"status":"ok","node_id":"...","keys":N}
//
// KEY is all that follows /kv/, percent-decoded and otherwise taken as it is.
// Errors are {"error":"..."}.
package storage

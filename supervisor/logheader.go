package supervisor

import (
	"bytes"
	"fmt"
	"strconv"
)

// A log that was rotated begins with one line that isn't the process's. It says, to people and programs, at which
// position the log goes on behind it, and which file holds what was before:
//
//	[sutra: this log goes on at byte 0000000000016771234; before it: node-1.log.0000000000000000000; 0004321 bytes of header]
//
// Its numbers have a fixed width. Blanks fill it up to the length that it says.
const (
	headerBegin  = "[sutra: this log goes on at byte "
	headerBefore = "; before it: "
	headerLength = "; "
	headerEnd    = " bytes of header]"

	positionDigits = 19 // of the largest int64
	lengthDigits   = 7
	maxHeader      = 1 << 20
	// maxName is the longest name that a file can have.
	maxName = 255
	// maxHeaderText is the longest header without its blanks.
	maxHeaderText = len(headerBegin) + positionDigits + len(headerBefore) + maxName + len(headerLength) + lengthDigits + len(headerEnd) + 1
)

// headerSize is the least length of a header that names a segment.
func headerSize(segment string) int64 {
	return int64(len(headerBegin) + positionDigits + len(headerBefore) + len(segment) + len(headerLength) + lengthDigits + len(headerEnd) + 1)
}

// newHeader is a header of the given length, which is at least headerSize and at most maxHeader.
func newHeader(position int64, segment string, length int64) []byte {
	line := fmt.Appendf(make([]byte, 0, length), "%s%0*d%s%s%s%0*d%s", headerBegin, positionDigits, position, headerBefore, segment,
		headerLength, lengthDigits, length, headerEnd)
	for int64(len(line)) < length-1 {
		line = append(line, ' ')
	}
	return append(line, '\n')
}

// parseHeader reads the beginning of a header, of which the blanks may be missing. A process can write such a line,
// too: where it is the first of its log it misleads those who read this log, and nobody else.
func parseHeader(b []byte) (position, length int64, ok bool) {
	b, ok = bytes.CutPrefix(b, []byte(headerBegin))
	if !ok || len(b) < positionDigits {
		return 0, 0, false
	}
	position, ok = digits(b[:positionDigits])
	rest, before := bytes.CutPrefix(b[positionDigits:], []byte(headerBefore))
	at := bytes.Index(rest, []byte(headerLength))
	if !ok || !before || at < 1 || at > maxName || bytes.IndexByte(rest[:at], '\n') >= 0 {
		return 0, 0, false
	}
	least := headerSize(string(rest[:at]))
	rest = rest[at+len(headerLength):]
	if len(rest) < lengthDigits || !bytes.HasPrefix(rest[lengthDigits:], []byte(headerEnd)) {
		return 0, 0, false
	}
	length, ok = digits(rest[:lengthDigits])
	if !ok || length < least || length > maxHeader {
		return 0, 0, false
	}
	return position, length, true
}

// digits reads a number that is written with nothing but digits.
func digits(b []byte) (int64, bool) {
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	return n, err == nil
}

package rpc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// auditFile has the calls that changed something. upkeepFile has what agents and clients do by themselves to be there: register,
	// leave, renew. refusedFile has what was refused, failed or changed nothing. They are three files, so that nobody pushes
	// out what others did by calls that cost him nothing.
	auditFile, upkeepFile, refusedFile = "audit.log", "upkeep.log", "refused.log"
	// auditSize is how long a file becomes before it is put aside, auditKept how many are, so that each takes 64 MiB at most.
	auditSize = 16 << 20
	auditKept = 3
	// refusedBurst is how many refusals of one address, or calls of one identity that changed nothing, are on record at once, and
	// one more each refusedEvery. The next one that is has the number of those that aren't.
	refusedBurst = 20
	refusedEvery = time.Second
	// begunBurst and begunEvery are that for what one identity begins and doesn't bring to a good end. It is in auditFile, because
	// something may have come of it, and yet could be repeated for ever.
	begunBurst = 200
	begunEvery = 10 * time.Second
	// maxAudited is how much is kept of a storage path in a request: what one may have. maxText is how much of any other text, and
	// of all of a call's that changed nothing.
	maxAudited = maxPath
	maxText    = 256
)

// Audit is the record of calls: of those that change something, and of those that were refused. A nil *Audit records
// nothing.
type Audit struct {
	log                   zerolog.Logger
	done, upkeep, refused *journal
	// hosts restrains refusals, told what else somebody could repeat for ever: by what it is, and whose.
	hosts   byAddress[restraint]
	told    remembered[uint64, restraint]
	seed    maphash.Seed
	publish func(*sutrav1.Event)
}

// OpenAudit opens the record in a folder, which is there. What is in its first file is also published, as events that others
// may see; nil: it isn't. The rest is not: who is refused all the time would push out what others did.
func OpenAudit(dir string, log zerolog.Logger, publish func(*sutrav1.Event)) (*Audit, error) {
	a := &Audit{log: log, seed: maphash.MakeSeed(), publish: publish}
	for _, one := range []struct {
		journal **journal
		name    string
	}{{&a.done, auditFile}, {&a.upkeep, upkeepFile}, {&a.refused, refusedFile}} {
		j, err := openJournal(filepath.Join(dir, one.name), auditSize, log)
		if err != nil {
			return nil, errors.Join(err, a.Close())
		}
		*one.journal = j
	}
	return a, nil
}

// Close closes the files. Calls that still end are not on record.
func (a *Audit) Close() (err error) {
	for _, j := range []*journal{a.done, a.upkeep, a.refused} {
		if j != nil {
			err = errors.Join(err, j.close())
		}
	}
	return err
}

// audited is a line of the record.
type audited struct {
	Time   time.Time `json:"time"`
	Method string    `json:"method"`
	// Who called, for example "user anna", and in which role.
	Who  string `json:"who"`
	Role string `json:"role,omitempty"`
	From string `json:"from"`
	// What the call was about: ids of the request and of the answer.
	What map[string]any `json:"what,omitempty"`
	// Begun says that this is the line of a call that only begins to have an effect. It has no code yet.
	Begun bool `json:"begun,omitempty"`
	// Code of gRPC, and the grid's own reason of an error.
	Code   string  `json:"code,omitempty"`
	Reason Reason  `json:"reason,omitempty"`
	TookMS float64 `json:"took_ms"`
	took   time.Duration
	// Omitted is how many such lines of the same host or identity before this one aren't on record.
	Omitted int `json:"omitted,omitempty"`
}

// event is the same as an event.
func (e audited) event() *sutrav1.Event {
	call := &sutrav1.CallEvent{
		Who: e.Who, Role: e.Role, From: e.From, Method: e.Method, What: make(map[string]string, len(e.What)), Code: e.Code, Reason: string(e.Reason),
		BeganAt: timestamppb.New(e.Time), Took: durationpb.New(e.took),
	}
	for field, value := range e.What {
		call.What[field] = fmt.Sprint(value)
	}
	return &sutrav1.Event{About: &sutrav1.Event_Call{Call: call}}
}

// line begins a line.
func line(ctx context.Context, method string, start time.Time, req any) audited {
	caller, took := callerOf(ctx), time.Since(start).Truncate(time.Microsecond)
	e := audited{
		Time: start.UTC(), Method: shortName(method), Who: caller.Identity.String(), From: "?", What: map[string]any{},
		TookMS: float64(took.Microseconds()) / 1000, took: took,
	}
	if caller.Identity != (pki.Identity{}) {
		e.Role = pki.RoleWord(caller.Identity.Role)
	}
	if addr := callersAddress(ctx); addr != nil {
		e.From = addr.String()
	}
	about(req, e.What)
	return e
}

// watch has Begins put a call on record.
func (a *Audit) watch(ctx context.Context, method string, start time.Time, req any) {
	if a == nil {
		return
	}
	u := underWayOf(ctx)
	u.begin = func(node, agent string) {
		e := line(ctx, method, start, req)
		e.Begun, e.What["node_id"], e.What["agent_id"] = true, node, agent
		if u.said = a.says(ctx, &e, "begun", begunBurst, begunEvery); u.said {
			a.done.write(e)
		}
	}
}

// Begins says that a call begins to have an effect, on a node. It is on record then who wanted it, even if this process is
// killed before the call ends. A context that is no call's is fine.
func Begins(ctx context.Context, node, agent string) {
	if u := underWayOf(ctx); u != nil && u.begin != nil && !u.begun {
		u.begun = true
		u.begin(node, agent)
	}
}

// says tells whether a line may be on record that somebody could repeat for ever, and counts it where it isn't.
func (a *Audit) says(ctx context.Context, e *audited, what string, burst int, every time.Duration) (say bool) {
	a.told.at(a.whose(ctx, what), func(r *restraint) { say, e.Omitted = r.say(time.Now(), burst, every) })
	return say
}

// whose is what restrains lines of a kind: who calls, or from which host where that isn't known.
func (a *Audit) whose(ctx context.Context, what string) uint64 {
	id := callerOf(ctx).Identity
	who := id.String()
	if id == (pki.Identity{}) {
		who = hostOf(callersAddress(ctx)).String()
	}
	return maphash.String(a.seed, what+"\n"+who)
}

// call puts a call on record that is worth it.
func (a *Audit) call(ctx context.Context, method string, start time.Time, req, resp any, err error) {
	if a == nil {
		return
	}
	policy, _ := PolicyOf(method)
	code := status.Code(err)
	refused := code == codes.Unauthenticated || code == codes.PermissionDenied
	if !refused && !policy.Mutates {
		return
	}
	caller, e := callerOf(ctx), line(ctx, method, start, req)
	e.Code = code.String()
	if err != nil {
		e.Reason = ReasonOf(err)
	} else {
		about(resp, e.What)
	}
	// In the clear nobody is known, and nobody a stranger.
	stranger := caller.Why != nil && !errors.Is(caller.Why, errInClear)
	var begun, said bool
	if u := underWayOf(ctx); u != nil {
		begun, said = u.begun, u.said
	}
	if said && err == nil { // it came to a good end, and restrains no other
		a.told.at(a.whose(ctx, "begun"), func(r *restraint) { r.full = r.full.Add(-begunEvery) })
	}
	journal, say := a.done, true
	switch {
	case refused, err != nil && stranger:
		journal = a.refused
		a.hosts.at(hostOf(callersAddress(ctx)), func(r *restraint) { say, e.Omitted = r.say(time.Now(), refusedBurst, refusedEvery) })
	case err != nil && begun:
		say = said || a.says(ctx, &e, "begun", begunBurst, begunEvery) // how it went stands beside that it began
	case !begun && (err != nil || idle(resp)):
		journal, say = a.refused, a.says(ctx, &e, "in vain", refusedBurst, refusedEvery)
	case slices.Contains(policy.Roles, sutrav1.Role_ROLE_AGENT), method == sutrav1.GridMaster_Renew_FullMethodName:
		journal, say = a.upkeep, a.says(ctx, &e, "upkeep "+e.Method, refusedBurst, refusedEvery)
	default:
		// The same again is the same. What differs in anything is always on record.
		say = a.says(ctx, &e, e.Method+fmt.Sprint(e.What), refusedBurst, refusedEvery)
	}
	if !say {
		return
	}
	if journal == a.refused {
		for field, value := range e.What {
			if text, ok := value.(string); ok {
				e.What[field] = cut(text, maxText)
			}
		}
	}
	journal.write(e)
	if journal == a.done && a.publish != nil {
		a.publish(e.event())
	}
	log, msg := a.log.Info(), "called"
	if refused {
		log, msg = a.log.Warn(), "refused"
	}
	log.Str("method", e.Method).Str("who", e.Who).Str("from", e.From).Any("what", e.What).Str("code", e.Code)
	if err != nil {
		log.Str("reason", string(e.Reason))
	}
	if e.Omitted > 0 {
		log.Int("omitted", e.Omitted)
	}
	log.Msg(msg)
}

// idle tells whether an answer says that there was nothing to do.
func idle(resp any) (idle bool) {
	message, ok := resp.(proto.Message)
	if !ok || message == nil || !message.ProtoReflect().IsValid() {
		return false
	}
	message.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		idle = f.Kind() == protoreflect.BoolKind && strings.HasPrefix(string(f.Name()), "already_") && v.Bool()
		return !idle
	})
	return idle
}

// tellable are the fields that a record may have, of a message and of the messages in it: ids and sizes. No other field
// is ever read, so that one which holds a secret needs nobody to think of it.
func tellable(name protoreflect.Name) (top, nested bool) {
	switch name {
	case "agent_id", "node_id", "token_id", "request_id", "profile", "port", "storage_path", "memory_limit_mb", "role", "endpoint", "uses_left", "root":
		return true, true
	case "name", "reason", "uses", "ttl", "epoch":
		return true, false
	default:
		return false, false
	}
}

// about adds to what is on record what a message tells of itself, and of the agent, node or token in it.
func about(m any, what map[string]any) {
	message, ok := m.(proto.Message)
	if !ok || message == nil || !message.ProtoReflect().IsValid() {
		return
	}
	message.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		top, _ := tellable(f.Name())
		switch {
		case top:
			tell(f, v, what)
		case f.Message() != nil && !f.IsList() && !f.IsMap() && (f.Name() == "agent" || f.Name() == "node" || f.Name() == "token"):
			v.Message().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
				if _, nested := tellable(f.Name()); nested {
					tell(f, v, what)
				}
				return true
			})
		}
		return true
	})
}

// Tellable is a text that somebody sent as far as it is kept for others to read: not too long, whole characters, no token.
func Tellable(text string) string { return told(text, maxAudited) }

func told(text string, most int) string {
	// No token is as long as what is cut off by the second cut, so that none is in two.
	return cut(string(pki.Conceal([]byte(text[:min(len(text), most+maxToken)]))), most)
}

// tell adds one field. Bytes are never told.
func tell(f protoreflect.FieldDescriptor, v protoreflect.Value, what map[string]any) {
	switch {
	case f.IsList(), f.IsMap():
	case f.Kind() == protoreflect.StringKind:
		most := maxText
		if f.Name() == "storage_path" {
			most = maxAudited
		}
		what[string(f.Name())] = told(v.String(), most)
	case f.Kind() == protoreflect.EnumKind:
		if word := f.Enum().Values().ByNumber(v.Enum()); word != nil {
			what[string(f.Name())] = strings.ToLower(strings.TrimPrefix(string(word.Name()), "ROLE_"))
		}
	case f.Kind() == protoreflect.Uint32Kind, f.Kind() == protoreflect.Uint64Kind:
		what[string(f.Name())] = v.Uint()
	case f.Kind() == protoreflect.MessageKind:
		if d, ok := v.Message().Interface().(*durationpb.Duration); ok {
			what[string(f.Name())] = d.AsDuration().String()
		}
	}
}

// maxToken is more than any token has.
const maxToken = 512

// cut is a text as far as it is kept.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + " ..."
}

// restraint keeps one host, or identity, from filling a record.
type restraint struct {
	// full is when as many as a burst may come at once again.
	full    time.Time
	omitted int
}

// say tells whether another one may be on record now, where so many may at once and one more each so often, and how many
// before it weren't.
func (r *restraint) say(now time.Time, burst int, every time.Duration) (say bool, omitted int) {
	if r.full.Before(now) {
		r.full = now
	}
	if r.full.Sub(now) > time.Duration(burst-1)*every {
		r.omitted++
		return false, 0
	}
	r.full = r.full.Add(every)
	omitted, r.omitted = r.omitted, 0
	return true, omitted
}

// journal is a file of JSON lines that nobody but its owner can read. A line is written at once and whole, by one append;
// so it is there as soon as its call is answered, whatever becomes of this process. It isn't synced: a host that loses its power
// may lose the last seconds. A disk that is full fails no call.
type journal struct {
	path  string
	limit int64
	log   zerolog.Logger

	file atomic.Pointer[os.File]
	size atomic.Int64
	// turning: the file is being put aside; others write to it meanwhile.
	turning atomic.Bool
	// lost counts the lines that couldn't be written since the last one that could.
	lost atomic.Int64
	// torn: the file may end in the middle of a line.
	torn atomic.Bool
}

func openJournal(path string, limit int64, log zerolog.Logger) (*journal, error) {
	j := &journal{path: path, limit: limit, log: log}
	if err := j.open(); err != nil {
		return nil, fmt.Errorf("open the record of calls: %w", err)
	}
	return j, nil
}

func (j *journal) open() error {
	f, err := os.OpenFile(j.path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, max(size-1, 0)); size > 0 && (err != nil || last[0] != '\n') {
		j.torn.Store(true) // by a full disk, or a host that lost its power
	}
	j.size.Store(size)
	if old := j.file.Swap(f); old != nil {
		_ = old.Close() // who writes to it still can end; nothing is buffered
	}
	return nil
}

func (j *journal) close() error { return j.file.Load().Close() }

// write appends a line.
func (j *journal) write(line any) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(line)
	if err == nil {
		err = j.append(text.Bytes())
	}
	if err != nil {
		if j.lost.Add(1) == 1 {
			j.log.Error().Err(err).Str("file", j.path).
				Msg("calls aren't on record, and are carried out all the same; free some space on the disk, and it goes on by itself")
		}
		return
	}
	if lost := j.lost.Swap(0); lost > 0 {
		j.log.Warn().Int64("lost", lost).Str("file", j.path).Msg("calls are on record again")
	}
	if j.size.Load() > j.limit {
		j.turnOver()
	}
}

// turnOver puts the file aside that has grown long, unless another one does, or has done so: once more would push out the
// oldest for a few lines.
func (j *journal) turnOver() {
	if !j.turning.CompareAndSwap(false, true) {
		return
	}
	defer j.turning.Store(false)
	if j.size.Load() <= j.limit {
		return
	}
	if err := j.turn(); err != nil {
		j.log.Error().Err(err).Str("file", j.path).Msg("the record of calls wasn't put aside, and grows")
		j.size.Store(0) // tried again when it has grown by as much
	}
}

func (j *journal) append(line []byte) error {
	torn := j.torn.CompareAndSwap(true, false)
	if torn {
		line = append([]byte{'\n'}, line...)
	}
	for {
		file := j.file.Load()
		n, err := file.Write(line)
		j.size.Add(int64(n))
		if 0 < n && n < len(line) || n == 0 && torn {
			j.torn.Store(true)
		}
		if errors.Is(err, os.ErrClosed) && j.file.Load() != file {
			continue // it was put aside in between
		}
		return err
	}
}

// turn puts the file aside and begins another one. Each step leaves whole files under names that it goes on from.
func (j *journal) turn() error {
	for i := auditKept; i > 0; i-- {
		older, newer := fmt.Sprintf("%s.%d", j.path, i), fmt.Sprintf("%s.%d", j.path, i-1)
		if i == 1 {
			newer = j.path
		}
		if err := os.Rename(newer, older); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return j.open()
}
